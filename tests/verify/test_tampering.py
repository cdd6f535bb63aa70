"""Every part of a run is made again by `verify`, or named in the list of what it cannot prove."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TinyEncoder, reseal, save_photos
from PIL import Image
from safetensors.torch import save_file

from hf_equiv.analyses import LipschitzConfig, MatchConfig, figures, make_plan, run_analysis
from hf_equiv.analyses.plan import read_command
from hf_equiv.analyses.run import VERBS
from hf_equiv.cli.main import _run
from hf_equiv.runs import shards
from hf_equiv.runs.directory import parse_record, read_record
from hf_equiv.runs.schema import LAYOUTS
from hf_equiv.verify import directory
from hf_equiv.verify.record import check_keys, check_list, check_settings
from hf_equiv.verify.rows import check_item, check_stated
from hf_equiv.verify.unverified import UNVERIFIED

OPTIONS = {
    "match": {"max_evals": 60, "radius": 0.25, "through": ("jpeg:60-95", "noise:2/255")},
    "spectrum": {"vectors": True},
    "lipschitz": {"directions": "top:1,toward,match", "regional": 0.5},
    "walk": {"num_steps": 2, "step": 0.3, "heading": "nearest"},
    "walk ahead": {"num_steps": 2, "step": 0.3},
}
every_run = pytest.mark.parametrize("name", OPTIONS)


def make_run(name: str, photos: Path, out: Path, encoder: Any = None, **more: Any) -> Path:
    verb, target = name.split()[0], str(photos / "class1" / "photo1.png")
    aimed = name in ("match", "lipschitz", "walk")
    given = {"source": str(photos / "class0" / "photo0.png")} | ({"target": target} if aimed else {})
    config = VERBS[verb].CONFIG(**given | OPTIONS[name] | more)
    run_analysis(make_plan(config, encoder or TinyEncoder()), out)
    return out


def others(value: Any) -> list[Any]:
    """Other values, of the same type and of other types."""
    if isinstance(value, dict):
        key = next(iter(value))
        return [value | {"more": 1}, value | {key: others(value[key])[0]}, {}, "text"]
    if isinstance(value, list):
        return [[*value, *value[-1:]], [*value[:-1], others(value[-1])[0]], [], None]
    if isinstance(value, bool):
        return [not value, int(value), str(value), None]
    if isinstance(value, int | float):
        return [value + 1, value * 1.1 + 0.01, value / 9 - 1, str(value), value == 1, None]
    return [f"{value}!", 7, ["text"], None if value is not None else "text"]


@every_run
def test_every_setting_is_made_again_or_named(name, runs):
    out, layout = runs[name], LAYOUTS[name.split()[0]]
    record, rows = read_record(out), list(shards.read_rows(out, layout=layout))
    assert not [*check_settings(record, layout, TinyEncoder()), *check_keys(record, layout, rows[0]["versions"])]
    missed = []
    for key, value in record["settings"].items():
        for other in (*others(value), "gone"):
            changed = copy.deepcopy(record)
            changed["settings"][key] = other
            if other == "gone":
                del changed["settings"][key]
            try:
                found = [*check_settings(changed, layout, TinyEncoder())]
                found += check_stated("rows", layout, changed, record[layout.listed][0], rows)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue  # `read_record` and `check_record` refuse it
            if not found and (other != "gone" or value is not None):
                missed.append((key, other))
    assert not missed
    changed["settings"]["unheard_of"] = 0
    assert "settings.unheard_of" in {p.column for p in check_settings(changed, layout, TinyEncoder())}
    del changed["command"]  # as in an early run
    assert "settings.unheard_of" in {p.column for p in check_settings(changed, layout, TinyEncoder())}


@every_run
def test_every_key_is_known_and_of_its_type(name, runs):
    layout, record = LAYOUTS[name.split()[0]], read_record(runs[name])
    rows = list(shards.read_rows(runs[name], layout=layout))

    def found(changed: dict[str, Any]) -> list[Any]:
        try:
            changed = parse_record(json.dumps(changed).encode())
            checks = check_list(changed, layout, rows), check_keys(changed, layout, rows[0]["versions"])
            return [problem for check in checks for problem in check] + list(
                check_settings(changed, layout, TinyEncoder())
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return ["refused"]

    def changed_to(key: str, value: Any) -> dict[str, Any]:
        return copy.deepcopy(record) | {key: value}

    assert not found(record)
    assert found(changed_to("unheard_of", 1))
    for key, kind in {"complete": 1, "command": 5, "errors": {"x": 1}, "closed_with": [], "photos": "mine"}.items():
        assert found(changed_to(key, kind)), key
    assert found(changed_to("command", record["command"] + " --seed 7"))
    assert found(changed_to("command", record["command"].replace("builtin", "google/vit", 1)))
    for key in record[layout.listed][0]:
        assert found(changed_to(layout.listed, [record[layout.listed][0] | {key: 5}])), key
    assert found(changed_to(layout.listed, [record[layout.listed][0] | {"more": "x"}]))


@every_run
def test_every_float_image_is_checked(name, runs):
    out, layout = runs[name], LAYOUTS[name.split()[0]]
    record, (path,) = read_record(out), shards.shard_files(out, layout)
    floats, costs = shards.read_floats(shards.float_file(path))
    rows = shards.read_shard(path, images=True, layout=layout)
    rows = [row | {"cost": costs.get(row[layout.item])} for row in rows]

    def found(images: dict[str, torch.Tensor]) -> list[Any]:
        entry, settings = record[layout.listed][0], record["settings"]
        other = list(directory.check_pixels("folder/part.parquet", layout, entry, rows[0], images))
        return other or check_item("folder/part.parquet", layout, TinyEncoder(), settings, rows, images)[1]

    def nudged(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[5] += 0.02 if float(x.view(-1)[5]) < 0.9 else -0.02
        return x

    assert not found(floats)
    noise = torch.Generator().manual_seed(1)
    changes = {
        "nudged": nudged, "turned": lambda x: -x, "doubled": lambda x: 2 * x, "other dtype": lambda x: x.to(torch.half),
        "flat": lambda x: x.flatten(),
        "another": lambda x: torch.rand(x.shape, generator=noise, dtype=torch.float64).to(x),
    }  # fmt: skip
    for key, image in floats.items():
        for told, change in changes.items():
            same = told == "turned" and key.endswith("/direction")  # ‖Jv‖ is that of −v
            assert same or found(floats | {key: change(image)}), (key, told)
        assert found({other: x for other, x in floats.items() if other != key}), key
    item = record[layout.listed][0][layout.item]
    assert found(floats | {f"{item}/more": torch.zeros(3)})


def rewrite(name: str, change):
    """Return a tampering with the text of a file."""
    return lambda out: (out / name).write_text(change((out / name).read_text()))


def blot(out: Path) -> None:
    path = out / "figures" / "spectra.png"
    image = Image.open(path).convert("RGBA")
    image.paste((0, 0, 0, 255), (20, 20, 24, 28))
    image.save(path)


def append(out: Path) -> None:
    path = out / "figures" / "spectra.png"
    path.write_bytes(path.read_bytes() + b"payload")


FILES = {
    "a line of the card": rewrite("README.md", lambda text: text + "All is proven.\n"),
    "a number of the card": rewrite("README.md", lambda text: text.replace("1 rows of 1", "9 rows of 9")),
    "files of the card": rewrite("README.md", lambda text: text.replace("path: spectra/*", "path: other/*")),
    "another configuration": rewrite("README.md", lambda text: text.replace("configs:", "configs:\n- config_name: a")),
    "dataset_info": rewrite("README.md", lambda text: text.replace("configs:", "dataset_info: {}\nconfigs:", 1)),
    "a figure with a blot": blot,
    "a figure with more in it": append,
    "a figure that is gone": lambda out: (out / "figures" / "spectra.png").unlink(),
    "one figure for another": lambda out: shutil.copy(out / "figures" / "vectors.png", out / "figures" / "spectra.png"),
}
FOREIGN = (
    "load.py", "spectra/more.parquet", "matches/part-00000.parquet", "float/part-00009.safetensors",
    "figures/more.png", "data/a.csv",
)  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_files_beside_the_rows_are_checked(what, copied):
    out = copied("spectrum")
    FILES[what](out)
    reseal(out)
    assert directory.verify_run(out).problems


def test_files_of_no_run_are_named(copied):
    out = copied("spectrum")
    for name in FOREIGN:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"foreign")

    def list_all(record: dict[str, Any]) -> None:
        there = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
        record["files"] = {path.relative_to(out).as_posix(): shards.sha256_file(path) for path in there}

    reseal(out, list_all)
    assert {*FOREIGN} <= {problem.file for problem in directory.verify_run(out).problems}


@every_run
def test_figures_drawn_twice_are_the_same(name, copied, monkeypatch):
    for drawn in ("pairs_figure", "spectrum_figures", "lipschitz_figures", "walk_figures"):
        monkeypatch.setattr(figures, drawn, getattr(figures, drawn).__wrapped__)  # elsewhere in a session drawn once
    assert directory.verify_run(copied(name)).problems == ()


def test_a_figure_of_other_software_is_left_open(copied, capsys, monkeypatch):
    out = copied("spectrum")
    blot(out)
    reseal(out, lambda record: record.pop("closed_with"))  # as in an early run
    report = directory.verify_run(out)
    assert report.holds
    assert "figures/spectra.png (drawn by other versions)" in report.unverified
    assert not [name for name in report.unverified if name.startswith("figures/vectors.png")]
    monkeypatch.chdir(out.parent)
    assert _run(["verify", "copy"]) == 0
    assert "figures/spectra.png (drawn by other versions)" in capsys.readouterr().out.splitlines()[-1]
    assert _run(["verify", "copy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unverified"] == list(report.unverified)


def test_a_key_that_is_there_twice(copied):
    out = copied("spectrum")
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text.replace('"seed": 0', '"seed": 7,\n "seed": 0', 1))
    with pytest.raises(ValueError, match="the key 'seed' is there twice"):
        directory.verify_run(out)


@pytest.mark.parametrize("same_time", [True, False])
def test_rows_under_a_second_id(same_time, copied):
    out, layout = copied("spectrum"), LAYOUTS["spectrum"]
    (path,) = shards.shard_files(out, layout)
    (row,), (floats, _) = (
        shards.read_shard(path, images=True, layout=layout),
        shards.read_floats(shards.float_file(path)),
    )
    twin = row | {"image_id": "twin", "seconds": row["seconds"] + (0.0 if same_time else 0.1)}
    more = {f"twin/{name.rpartition('/')[2]}": x.clone() for name, x in floats.items()}
    shards.write_shard(out, 0, [row, twin], floats | more, {}, layout)

    def list_both(record: dict[str, Any]) -> None:
        items = [*record["images"], record["images"][0] | {"image_id": "twin"}]
        names = (
            VERBS["spectrum"]
            .CONFIG()
            .settings_of_items([type("Item", (), {"name": i["image_id"], "columns": i}) for i in items])
        )
        record["images"] = items
        record["settings"] |= names

    reseal(out, list_both)
    report = directory.verify_run(out)
    assert any("it is a copy" in problem.message for problem in report.problems) is same_time
    if not same_time:
        assert "whether photo0.png, twin, of the same pixels, are 2 images" in report.unverified


@every_run
def test_another_source_is_not_the_one_that_was_listed(name, copied):
    out = copied(name)
    reseal(out, lambda record: next(iter(record[LAYOUTS[record["analysis"]].listed])).update(pixels="0" * 64))
    assert "pixels" in {problem.column for problem in directory.verify_run(out).problems}


def test_unverified_names_are_parts_of_runs():
    names = {field for verb in VERBS.values() for field in verb.CONFIG.__dataclass_fields__}
    names |= {column for layout in LAYOUTS.values() for column in layout.all_features}
    names |= {"drawn", "command", "closed_with", "errors", "digits", "compression"}
    assert {name.partition(" ")[0] for name in UNVERIFIED} <= names


@pytest.mark.parametrize("name", ["match", "spectrum", "walk ahead"])
def test_float64_runs_hold_and_say_so(name, tmp_path, monkeypatch):
    encoder = TinyEncoder(dtype=torch.float64)
    out = make_run(name, save_photos(tmp_path / "photos"), tmp_path / "out", encoder, dtype="float64")
    monkeypatch.setattr(
        directory, "load_recorded", lambda settings, *_: TinyEncoder(dtype=getattr(torch, settings["dtype"]))
    )
    assert directory.verify_run(out).problems == ()
    layout = LAYOUTS[name.split()[0]]
    (path,) = shards.shard_files(out, layout)
    rows = [row | {"dtype": "float32"} for row in shards.read_shard(path, images=True, layout=layout)]
    floats, costs = shards.read_floats(shards.float_file(path)) if shards.float_file(path).exists() else ({}, {})
    shards.write_shard(out, 0, rows, floats, costs, layout)
    reseal(out, lambda record: record["settings"].update(dtype="float32"))
    reseal(out, lambda record: record.update(command=record["command"].replace("float64", "float32")))
    assert directory.verify_run(out).problems


def test_a_float_file_has_no_more_than_images(copied):
    out = copied("match")
    path = out / "float" / "part-00000.safetensors"
    floats, costs = shards.read_floats(path)
    save_file(floats, path, metadata={"num_evals": json.dumps(costs), "more": "text"})
    reseal(out)
    assert directory.verify_run(out).problems


def test_a_command_is_read_as_it_was_written(photos):
    given = {"pairs": 2, "solver": "adam", "radius": 8 / 255, "norm": "l2", "refine": False, "seed": 3, "rtol": 2e-5}
    given |= {"through": ("jpeg:60-95", "blur:1")}
    plan = make_plan(MatchConfig(data=str(photos), **given), TinyEncoder())
    assert read_command(plan.command, MatchConfig) == MatchConfig(data="photos", readout="cls", **given)
    given = {"directions": "random:2,gradient", "radii": tuple(1e-3 * 1.2**k for k in range(9)), "linearity": True}
    plan = make_plan(LipschitzConfig(data=str(photos), limit=2, **given), TinyEncoder())
    assert read_command(plan.command, LipschitzConfig) == LipschitzConfig(
        data="photos", limit=2, readout="cls", **given
    )
    for wrong in (
        "hf-equiv match builtin",
        "hf-equiv lipschitz builtin --pairs 2",
        "hf-equiv lipschitz builtin --seed",
    ):
        with pytest.raises(ValueError, match="`command` must"):
            read_command(wrong, LipschitzConfig)
