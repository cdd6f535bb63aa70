import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from fakes import TinyEncoder, draw_photo, save_photos

from hf_equiv.analyses import figures, run
from hf_equiv.cli import environment, progress
from hf_equiv.cli.options import with_flags
from hf_equiv.report import collect, page
from hf_equiv.runs import shards
from hf_equiv.runs.directory import locked
from hf_equiv.runs.execute import RunProgress
from hf_equiv.verify import directory

main = importlib.import_module("hf_equiv.cli.main")  # `hf_equiv.cli.main` is the function
audit = importlib.import_module("hf_equiv.cli.audit")


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """An empty working directory, and the encoder that costs nothing in place of every model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "load_encoder", lambda model, **_: tiny)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    for k in (1, 2):
        draw_photo(k).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


PAIR = ["match", "builtin", "--source", "1.png", "--target", "2.png", "--max-evals", "30"]


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = main._run([str(a) for a in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_help_is_quick_and_complete():
    start = time.perf_counter()
    told = subprocess.run([sys.executable, "-m", "hf_equiv", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # half a second on an idle machine; no heavy import is what counts
    text = " ".join(told.stdout.split())
    for verb in ("match", "spectrum", "lipschitz", "walk", "verify", "publish", "report", "env"):
        assert f" {verb} " in text.split("Commands:")[1] + " "
    assert "Exit codes: 0 done; 1 some row did not" in text
    assert "; 2 bad input; 130 stopped by Ctrl-C; run the same command to continue." in text
    script = """if True:
        import sys
        from hf_equiv.cli.main import _run, cli
        assert all(_run([verb, "--help"]) == 0 for verb in cli.commands)
        _run(["match", "--help"])
        print("torch" in sys.modules)"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("False\n")
    flags = """--source --target --data --pairs --solver --radius --norm --rtol --max-evals --no-refine --labels --out
        --overwrite --seed --revision --readout --normalize --device --dtype --batch-size --image-column --label-column
        --cache-dir --local-files-only --dry-run --json -q"""
    assert all(flag in told.stdout for flag in flags.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("walk builtin --steps 3", "--num-steps"),
        ("match builtin --linearity", "No such option '--linearity'. It is an option of lipschitz. See"),
        ("match builtin --radus 1", "--radius"),
        ("space run --foo", "See hf-equiv space run --help."),
    ],
)
def test_an_unknown_option_names_the_right_one(given, said, capsys):
    code, out, err = call(capsys, *given.split())
    assert (code, out) == (2, "")
    assert said in err


def test_help_of_shared_options_fits_the_command(capsys):
    def told(verb):
        return " ".join(call(capsys, verb, "--help")[1].split())

    assert "Pairs in one pass. Default: 8, on a GPU 32." in told("match")
    assert "bf16 or float16 for early iterations only" in told("match")
    for verb in ("spectrum", "lipschitz"):
        assert "Derivatives in one pass on a GPU" in told(verb)
        assert "bf16" not in told(verb)
    assert "Walks side by side" in told("walk")


def test_of_several_processes_the_first_verifies_and_publishes(place, capsys, monkeypatch):
    assert call(capsys, *PAIR, "--out", "run", "--rtol", "0.9")[0] == 0
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, "verify", "run") == call(capsys, "publish", "nowhere", "a/b") == (0, "", "")
    assert call(capsys, *PAIR, "--dry-run", "--quiet") == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "hold" in call(capsys, "verify", "run")[1]


def test_match_and_verify_as_json(place, capsys):
    code, out, _ = call(capsys, *PAIR, "--out", "run", "--json", "--rtol", "0.5")
    result = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert list(result) == ["analysis", "model", "revision", "out", "rows", "summary"]
    assert (result["analysis"], result["model"], result["out"]) == ("match", "builtin", "run")
    assert [row["pair_id"] for row in result["rows"]] == ["1.png->2.png"]
    code, out, err = call(capsys, "verify", "run", "--json")
    assert code == 0
    assert err == ""
    assert json.loads(out)["verified"] == 1
    (place / "run" / "figures" / "pairs.png").write_bytes(b"")
    code, out, _ = call(capsys, "verify", "run", "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["file"] == "figures/pairs.png"


def test_match_for_people(place, capsys):
    code, out, err = call(capsys, *PAIR, "--rtol", "1e-13")
    assert code == 1
    folder = next((place / "runs" / "match" / "builtin").iterdir()).relative_to(place)
    assert "1.png -> 2.png" in out
    refined = next(iter(shards.read_costs(place / folder).values()))["refine"]
    assert re.search(rf"evals +refine +time.*\n.* 30 +{refined:.0f} ", out)
    assert f"pictures:  {folder}/figures\n" in out
    assert f"check it:  hf-equiv verify {folder}" in out
    assert "1 of 1 rows on disk" in err
    code, out, err = call(capsys, *PAIR, "--rtol", "1e-13", "-q")
    assert (code, out) == (1, "")
    assert err.startswith(f"1 of 1 rows in {folder} did not converge. ")
    assert "Raise --max-evals, or loosen --rtol." in err
    assert err.count("\n") == 1
    code, out, _ = call(capsys, "verify", folder)
    assert code == 0
    assert out.startswith(f"The row of {folder} holds")


def test_radius_may_be_a_fraction(place, capsys):
    _, out, _ = call(capsys, *PAIR, "--radius", "8/255", "--json")
    row = json.loads(out)["rows"][0]
    assert row["radius"] == 8 / 255
    assert row["linf"] <= 8 / 255 + 1e-7


def test_dry_run_writes_nothing(place, capsys):
    code, out, _ = call(capsys, *PAIR, "--dry-run")
    assert code == 0
    assert "rows to make" in out
    code, out, _ = call(capsys, *PAIR, "--dry-run", "--json")
    told = json.loads(out)
    assert told["dry_run"]["rows_to_make"] == 1
    assert told["dry_run"]["estimated_seconds"] >= 0
    assert sorted(p.name for p in place.iterdir()) == ["1.png", "2.png", "notes.txt"]
    code, out, _ = call(capsys, *PAIR, "--dry-run", "--out", "deep/run")
    assert code == 0
    assert not (place / "deep").exists()


def test_env(place, capsys):
    code, out, _ = call(capsys, "env", "--json")
    assert code == 0
    assert {"torch", "transformers", "datasets"} <= set(json.loads(out)["versions"])
    code, out, _ = call(capsys, "env")
    assert "transformers" in out


def test_env_of_the_built_in_model(capsys):
    code, out, _ = call(capsys, "env", "builtin", "--json")
    model = json.loads(out)["model"]
    assert code == 0
    assert model["N"] == 3 * 224 * 224
    assert model["jvp"] is True
    assert model["head"]["classes"] == 20
    assert "cls" in model["readouts"]
    assert isinstance(model["processor"], str)
    code, out, _ = call(capsys, "env", "builtin")
    assert max(map(len, out.splitlines())) <= 120
    assert "\n    do_resize             yes\n" in out
    assert "forward-mode (JVP)      yes\n" in out
    assert "error" not in out


@pytest.mark.parametrize("again", [[], ["--overwrite", "always"], ["--overwrite=always"]])  # which would begin anew
def test_interrupt_says_how_to_go_on(again, place, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_equiv.analyses.stages.each_match", stop)
    code, out, err = call(capsys, *PAIR, "--out", "run", "-q", *again)
    assert code == 130
    assert out == ""
    assert err.lstrip() == (  # click ends the line of the ^C first
        "interrupted; 0 of 1 rows are kept in run; unfinished ones start again. "
        f"To continue{' without --overwrite' if again else ''}: "
        "hf-equiv match builtin --source 1.png --target 2.png --max-evals 30 --out run -q\n"
    )


BAD = [
    (["match"], "Missing argument 'MODEL"),
    (["frobnicate"], "No such command 'frobnicate'"),
    ([*PAIR, "2.png", "3.png"], "Got unexpected extra arguments (2.png 3.png). A flag takes one name: for several"),
    (["match", "builtin", "--rtol", "tiny"], "'tiny' is not a valid float"),
    (["match", "builtin", "--solver", "magic"], "'magic' is not one of"),
    ([*PAIR, "--radius", "0"], "--radius must lie in (0, 1]"),
    ([*PAIR, "--radius", "-8/255"], "--radius must lie in (0, 1]"),
    ([*PAIR, "--radius", "nan"], "--radius must lie in (0, 1]"),
    ([*PAIR, "--radius", "8/0"], "Invalid value for '--radius': '8/0' is not a number or a fraction such as 8/255."),
    ([*PAIR, "--radius", "1.5"], "--radius must lie in (0, 1]"),
    ([*PAIR, "--radius", "30", "--norm", "l2"], "--radius must lie in (0, 27.7"),
    ([*PAIR, "--radius", "0", "--norm", "l2"], "--radius must be finite and above 0"),
    ([*PAIR, "--rtol", "1"], "Invalid value for '--rtol': 1.0 is not in the range 0<x<1."),
    ([*PAIR, "--rtol", "0"], "Invalid value for '--rtol': 0.0 is not in the range 0<x<1."),
    ([*PAIR, "--rtol", "nan"], "--rtol must be finite and above 0"),
    ([*PAIR, "--batch-size", "0"], "Invalid value for '--batch-size': 0 is not in the range x>=1."),
    ([*PAIR, "--through", "jpeg:101"], "--through must give jpeg a whole quality from 1 to 100"),
    ([*PAIR, "--through", ","], "--through must name a transformation; got none. Write jpeg:75, or leave it out."),
    ([*PAIR, "--labels", "cat"], "--labels must be at least two different names"),
    (["match", "builtin", "--source", "1.png"], "--source must come with --target"),
    (["match", "builtin", "--source", "1.png", "--target", "1.png"], "source and target must be different images"),
    (["match", "builtin", "--source", "1.png", "--target", "9.png"], "'9.png' does not exist"),
    (["match", "builtin", "--data", "builtin", "--pairs", "99"], "--pairs must be at most 12"),
    ([*PAIR, "--norm", "linf"], "--norm must come with --radius; got 'linf' alone"),
    ([*PAIR, "--source", "2.png"], "--source may be given once; got 1.png, 2.png."),
    ([*PAIR, "--image-column", "photo"], "--image-column must come with a parquet file or a dataset; '1.png' has no"),
    (["match", "builtin", "--label-column", "kind"], "--label-column must come with a parquet file or a dataset"),
    (["match", "builtin", "--source", "*.png", "--target", "1.png"], "'*.png' does not exist, and patterns are not"),
    (["match", "builtin", "--data", "notes.txt"], "'notes.txt' must be an image file"),
    ([*PAIR, "--dry-run", "--out", "1.png"], "run directory '1.png' cannot be written: Not a directory."),
    ([*PAIR, "--dry-run", "--out", "1.png/run"], "run directory '1.png/run' cannot be written: Not a directory."),
    (["verify", "nowhere"], "'nowhere' must be a run directory; it does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, arguments, message):
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "runs").exists()


def test_a_local_checkpoint_is_recorded_by_name_and_found_again(tmp_path, monkeypatch, capsys):
    from tiny_models import save

    model = save("vit_head", tmp_path / "a-private-place" / "my-model")
    monkeypatch.chdir(tmp_path)
    data = save_photos(tmp_path / "another-private-place" / "photos", 2)
    given = "--data", data, "--pairs", "1", "--radius", "8/255", "--max-evals", "3"
    code, out, _ = call(capsys, "match", model, *given, "--out", "run", "--json")
    assert code == 1
    assert json.loads(out)["model"] == json.loads(out)["rows"][0]["model_id"] == "my-model"
    assert "private-place" not in out
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not any(b"private-place" in data for data in written)
    assert call(capsys, "verify", "run")[0] == 0  # its path is remembered on this machine
    report = call(capsys, "report", "run", "--no-survival")
    assert report[0] == 0
    told = r"hf-equiv match a-private-place/my-model .*--data another-private-place/photos --pairs 1 --radius 8/255"
    assert re.search(told, (tmp_path / "reports" / "my-model.md").read_text())
    moved = Path(model).rename(tmp_path / "elsewhere")
    code, _, err = call(capsys, "verify", "run")
    assert code == 2
    assert "this run used the local checkpoint 'my-model'" in err
    assert f"is no longer at '{model}'. Name it with --model PATH." in err
    save("vit_msn", Path(model))
    code, _, err = call(capsys, "verify", "run")
    assert code == 2
    assert "has changed since the run" in err
    assert call(capsys, "verify", "run", "--model", moved)[0] == 0
    other = save("vit_msn", tmp_path / "other" / "my-model")
    code, out, _ = call(capsys, "verify", "run", "--model", other)
    assert code == 1
    assert "other weights were loaded" in out


def test_bad_named_photos_are_listed_before_any_work(place, capsys):
    photos = save_photos(place / "photos")
    draw_photo(9).save(place / "t.png")
    for k in (1, 2):
        (photos / f"class{k}" / f"photo{k}.png").write_bytes(b"broken" * (k - 1))
    for flag in ("--dry-run", "--json"):
        code, out, err = call(capsys, "match", "builtin", "--source", "photos", "--target", "t.png", flag)
        assert (code, out) == (2, "")
        head, *lines = err.splitlines()
        assert head == "error: 2 images cannot be used. Name others."
        assert sorted(line[:46] for line in lines) == [
            "- image 'class1/photo1.png' must hold an image",
            "- image 'class2/photo2.png' must be an image f",
        ]
    assert not (place / "runs").exists()


def test_dry_run_names_photos_of_a_set_that_cannot_be_read(place, capsys):
    photos = save_photos(place / "photos")
    drawn = ["match", "builtin", "--data", "photos", "--pairs", "7", "--dry-run"]
    assert "unusable" not in call(capsys, *drawn)[1]
    names = ["class1/photo1.png", "class2/photo2.png"]
    for name in names:
        (photos / name).write_bytes(b"broken")
    code, out, _ = call(capsys, *drawn)
    assert code == 0
    rows, images = (re.search(rf"{key} +(.*)\n", out)[1] for key in ("rows of status error", "unusable images"))
    assert sorted(images.split(", ")) == names
    told = json.loads(call(capsys, *drawn, "--json")[1])["dry_run"]
    assert sorted(told["unusable_images"]) == names
    assert all(why.startswith(f"image {name!r} must be an") for name, why in told["unusable_images"].items())
    code, out, _ = call(capsys, *drawn[:-1], "--max-evals", "5", "--json")
    failed = sum(row["status"] == "error" for row in json.loads(out)["rows"])
    assert int(rows) == told["rows_of_status_error"] == failed > 0
    for verb, count in (("spectrum", 2), ("lipschitz", 4)):  # of which every image has the next one as its target
        told = json.loads(call(capsys, verb, "builtin", "--data", "photos", "--dry-run", "--json")[1])["dry_run"]
        assert sorted(told["unusable_images"]) == names
        assert told["images_of_status_error"] == count
        assert "unusable images" in call(capsys, verb, "builtin", "--data", "photos", "--dry-run")[1]


def test_one_of_several_image_columns_is_said_aloud(place, capsys):
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    rows = [{"left": draw_photo(k), "right": draw_photo(k + 5)} for k in range(3)]
    datasets.Dataset.from_list(rows, features=features).to_parquet("two.parquet")
    given = ["match", "builtin", "--data", "two.parquet", "--pairs", "1", "--max-evals", "3", "--no-refine"]
    given += ["--cache-dir", "cache"]
    said = "taking image column 'left' of left, right; `image_column` names another"
    assert said in call(capsys, *given)[2].splitlines()
    assert f" {said}\n" in call(capsys, *given, "--dry-run")[1]
    assert json.loads(call(capsys, *given, "--dry-run", "--json")[1])["dry_run"]["choices"] == [said]
    for more in (["-q"], ["--json"], ["--image-column", "left"], ["--image-column", "right"]):
        assert "taking" not in call(capsys, *given, *more)[2]


def test_the_time_left_is_that_of_rows_that_take_time(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_equiv.cli.progress.time.monotonic", lambda: clock[0])
    with progress.run_progress(quiet=False) as tell:
        tell(RunProgress("saved", 0, 20))
        tell(RunProgress("note", pair_ids=("a",), message="a: torn"))
        clock[0] = 0.06
        tell(RunProgress("saved", 1, 20))
        tell(RunProgress("saved", 6, 20))
        clock[0] = 60.0
        tell(RunProgress("saved", 12, 20))
        clock[0] = 600.0
        tell(RunProgress("saved", 20, 20))
    assert capsys.readouterr().err.splitlines() == [
        "0 of 20 rows on disk",
        "error: a: torn",
        "1 of 20 rows on disk",
        "6 of 20 rows on disk, 0 s left",
        "12 of 20 rows on disk, 44 s left",
        "20 of 20 rows on disk",
    ]


@pytest.mark.parametrize(
    "options", [["match", "--pairs", "7", "--max-evals", "5", "--no-refine"], ["spectrum", "--k", "2"]]
)
def test_a_run_over_another_state_of_the_data_is_told(place, capsys, options):
    verb, *more = options
    command = [verb, "builtin", "--data", "photos", *more]
    torn = save_photos(place / "photos") / "class1" / "photo1.png"
    torn.write_bytes(b"broken")
    assert "another state" not in call(capsys, *command)[2]
    assert "another state" not in call(capsys, *command)[2]
    (folder,) = (place / "runs" / verb / "builtin").iterdir()
    folder = folder.relative_to(place)
    draw_photo(1).save(torn)
    said = f"{folder} holds the same run over another state of the data"
    assert f"{said}: --out {folder} would keep its rows; this run begins anew" in call(capsys, *command, "--dry-run")[2]
    assert "another state" not in call(capsys, *command, "--dry-run", "--seed", "1")[2]
    assert "another state" not in call(capsys, *command, "--dry-run", "--json")[2]
    code, out, err = call(capsys, *command, "--dry-run", "--out", folder)
    assert code == 0
    assert "another state" not in err
    assert not re.search(r"(rows|images) there +0\n", out)
    for name, k in (("class1/photo4.png", 11), ("class2/photo2.png", 13)):
        draw_photo(k).save(place / "photos" / name)
    assert f"{said}, in which readable images changed" in call(capsys, *command, "--dry-run")[2]
    assert "another state" not in call(capsys, *command, "--json")[2]


def test_photos_that_changed_are_told_in_words(place, capsys):
    call(capsys, *PAIR, "--out", "run", "-q")
    draw_photo(9).save(place / "1.png")
    code, _, err = call(capsys, *PAIR, "--out", "run")
    assert code == 2
    assert "holds a run of other settings: the photos changed (" in err


def test_each_cause_of_an_error_is_told_once(place, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("this image is too much")

    save_photos(place / "photos")
    monkeypatch.setattr("hf_equiv.analyses.stages.each_match", broken)
    code, out, _ = call(capsys, "match", "builtin", "--data", "photos", "--pairs", "4", "--out", "run")
    assert code == 1
    assert out.count("this image is too much") == 1
    (cause,) = re.findall(
        r"\n(error: this image is too much \(4: (?:class\d/photo\d.png->class\d/photo\d.png, ){3}…\))\n", out
    )
    code, out, err = call(capsys, "match", "builtin", "--data", "photos", "--pairs", "4", "--out", "run", "-q")
    assert (code, out) == (1, "")
    assert err == f"4 of 4 rows in run did not converge. {cause}\n"
    code, out, _ = call(capsys, "verify", "run")
    assert code == 1
    assert out == "Nothing in run can be checked; 4 of 4 rows are of status error and hold no match.\n"


# --- messages ---


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("`max_evals` must be at least 1; got 0.", "--max-evals must be at least 1; got 0."),
        ("not cached and `local_files_only=True`. Run", "not cached and --local-files-only. Run"),
        (
            "as in `license='cc-by-4.0'`. Or `i_have_the_right=True`.",
            "as in --license cc-by-4.0. Or --i-have-the-right.",
        ),
        ("pass `raise_on_failure=False`, log in with `hf auth login`", None),
        ("source and target must differ: https://h.co/a?max_evals=x", None),
    ],
)
def test_a_message_names_flags(message, told):
    assert with_flags(message, [*main.match.params, *main.publish.params]) == (told or message)


@pytest.mark.parametrize("command", [PAIR, ["audit", "builtin"]], ids=lambda command: command[0])
def test_a_folder_in_work_is_refused_before_the_model_is_loaded(command, place, capsys, monkeypatch):
    monkeypatch.setattr(environment, "load_encoder", lambda *_, **__: pytest.fail("loaded"))
    busy = place / "out" / ("" if command is PAIR else "match-8")
    with locked(busy):
        code, _, err = call(capsys, *command, "--out", place / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert f"'{busy}' is being written by another run. Wait for it" in err
    with pytest.raises(pytest.fail.Exception):
        call(capsys, *command, "--out", place / "out")


def test_other_settings_exit_2(place, capsys):
    call(capsys, *PAIR, "--out", "run", "-q")
    code, _, err = call(capsys, *PAIR, "--out", "run", "--seed", "5")
    assert code == 2
    assert "seed (0 there, 5 asked)" in err
    code, _, _ = call(capsys, *PAIR, "--out", "run", "--seed", "5", "--overwrite", "always", "-q")
    assert code in (0, 1)


def test_a_bug_is_one_line_too_and_debug_shows_it(place, capsys, monkeypatch):
    def broken(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr(environment, "load_encoder", broken)
    code, _, err = call(capsys, *PAIR)
    assert code == 2
    assert err == "error: KeyError: 'oops' (HF_EQUIV_DEBUG=1 shows where)\n"
    monkeypatch.setenv("HF_EQUIV_DEBUG", "1")
    with pytest.raises(KeyError):
        main._run(PAIR)


def test_built_in_model_from_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "hf_equiv", "match", "builtin", "--max-evals", "3", "--no-refine", "--json"]
    search = os.pathsep.join(
        [os.path.dirname(os.path.dirname(os.path.dirname(main.__file__))), os.environ.get("PYTHONPATH", "")]
    )
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
    told = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert json.loads(told.stdout)["rows"][0]["pair_id"] == "cat->coffee"


def test_an_audit_is_one_command_that_goes_on(place, capsys, monkeypatch):
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder())
    monkeypatch.setattr(audit, "_PHOTOS", 1)
    monkeypatch.setattr(collect, "AUDIT_LEVELS", (8,))
    for name, drawn in {"pairs": None, "spectrum": {}, "lipschitz": {}}.items():  # which takes most of the time
        monkeypatch.setattr(figures, f"{name}_figure{'' if drawn is None else 's'}", lambda *_, drawn=drawn: drawn)
    monkeypatch.setattr(figures, "png_of", lambda _: b"drawn")
    save_photos(place / "photos")
    words = ["audit", "builtin", "--data", "photos", "--pairs", "2", "--out", "here"]
    code, out, err = call(capsys, *words, "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"match-8 +match within 8/255, 2 pairs, about \d+ (s|min)\n", out)
    assert re.search(r"report +page with JPEG, resizing and blur \(time without figures\), about [1-9]\d* s\n", out)
    assert re.search(r"time +about \d+ (s|min): roughly [\d,]+ evaluations, \S+ ms each as timed now on cpu\n", out)
    told = json.loads(call(capsys, *words, "--dry-run", "--json")[1])
    assert told["dry_run"]["evaluations"].keys() == told["dry_run"]["parts"].keys()
    assert not (place / "here").exists()

    carry_out, started = run.run_analysis, []

    def stop_at_third(plan, folder, **how):
        started.append(folder)
        if len(started) == 3:
            raise KeyboardInterrupt
        return carry_out(plan, folder, **how)

    monkeypatch.setattr(run, "run_analysis", stop_at_third)
    report, made = page.make_report, []

    def once(*given, **how):
        made.extend([] if made else [report(*given, **how)])
        return made[0]

    monkeypatch.setattr(page, "make_report", once)
    code, _, err = call(capsys, *words)
    assert code == 130
    assert "part 2 of 5: match within 8/255, 2 pairs\n" in err
    assert "interrupted; 4 of 6 pairs and photos of all parts are kept in here; unfinished ones start again. " in err
    assert " For a page of those: hf-equiv report here. To continue: " in err
    assert f"To continue: hf-equiv {' '.join(words)}\n" in err
    code, out, err = call(capsys, *words)
    assert code == 0
    assert "part 2 of 5: match within 8/255, 2 pairs, 0 to do\n" in err
    assert out.split("\n\n")[0].count("\n") == 0  # the answer
    assert "report:    here/report.html\nruns:      here/match\n           here/match-8\n" in out
    assert "--radius 8/255\n" in (place / "here" / "report.md").read_text()
    assert call(capsys, "verify", "here/match-8")[0] == 0
    code, again, err = call(capsys, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(again)["answer"] == out.split("\n")[0]
    assert [one["out"] for one in json.loads(again)["runs"]][-2:] == ["here/spectrum", "here/lipschitz"]
    code, _, err = call(capsys, *words[:-1], "here/match")
    assert code == 2
    assert "--out must be a folder of runs; 'here/match' is a run directory." in err


@pytest.mark.parametrize("verb", ["audit", "match", "spectrum", "lipschitz", "walk"])
def test_only_builtin_has_photos_by_default(verb, capsys):
    code, out, err = call(capsys, verb, "a/b")
    assert (code, out) == (2, "")
    assert "--data must name photos for a checkpoint other than builtin; got none for 'a/b'. Add --data W" in err
