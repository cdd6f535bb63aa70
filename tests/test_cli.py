import json
import os
import subprocess
import sys
import time

import pytest
from fakes import TinyEncoder, draw_photo

from hf_equiv import cli, environment, verify


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """An empty working directory, and the encoder that costs nothing in place of every model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "load_encoder", lambda model, **_: tiny)
    monkeypatch.setattr(verify, "_load", lambda *_: TinyEncoder())
    for k in (1, 2):
        draw_photo(k).save(tmp_path / f"{k}.png")
    return tmp_path


PAIR = ["match", "builtin", "--source", "1.png", "--target", "2.png", "--max-evals", "30"]


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli._run([str(a) for a in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_help_is_quick_and_complete():
    start = time.perf_counter()
    told = subprocess.run([sys.executable, "-m", "hf_equiv", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # half a second on an idle machine; no heavy import is what counts
    assert all(word in told.stdout for word in ("match", "verify", "env", "Exit codes"))
    script = "import sys; from hf_equiv import cli; cli._run(['match', '--help']); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("False\n")
    flags = """--source --target --data --pairs --solver --radius --norm --rtol --max-evals --no-refine --labels --out
        --overwrite --seed --revision --readout --normalize --device --dtype --batch-size --image-column --label-column
        --cache-dir --local-files-only --dry-run --json -q"""
    assert all(flag in told.stdout for flag in flags.split())


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
    assert f"picture:  {folder}/figures/pairs.png" in out
    assert f"check it: hf-equiv verify {folder}" in out
    assert "1 of 1 rows on disk" in err
    code, out, err = call(capsys, *PAIR, "--rtol", "1e-13", "-q")
    assert (code, out, err) == (1, "", "")
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
    assert sorted(p.name for p in place.iterdir()) == ["1.png", "2.png"]


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
    assert model["N"] == 3 * 64 * 64
    assert model["jvp"] is True
    assert model["head"]["classes"] == 20
    assert "cls" in model["readouts"]


def test_interrupt_says_how_to_go_on(place, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_equiv.matchrows.match_embedding", stop)
    monkeypatch.setattr(sys, "argv", ["hf-equiv", *PAIR])
    code, out, err = call(capsys, *PAIR, "--out", "run", "-q")
    assert code == 130
    assert out == ""
    assert err.lstrip() == (  # click ends the line of the ^C first
        "error: interrupted; 0 of 1 rows are kept in run. To finish the rest, run: "
        "hf-equiv match builtin --source 1.png --target 2.png --max-evals 30\n"
    )


BAD = [
    (["match"], "Missing argument 'MODEL'"),
    (["frobnicate"], "No such command 'frobnicate'"),
    (["match", "builtin", "--rtol", "tiny"], "'tiny' is not a valid float"),
    (["match", "builtin", "--solver", "magic"], "'magic' is not one of"),
    ([*PAIR, "--radius", "0"], "`radius` must lie in (0, 1]"),
    ([*PAIR, "--radius", "-8/255"], "`radius` must lie in (0, 1]"),
    ([*PAIR, "--radius", "nan"], "`radius` must lie in (0, 1]"),
    ([*PAIR, "--radius", "8/0"], "`radius` must be a number or a fraction such as 8/255; got '8/0'"),
    ([*PAIR, "--radius", "1.5"], "`radius` must lie in (0, 1]"),
    ([*PAIR, "--radius", "30", "--norm", "l2"], "`radius` must lie in (0, 27.7"),
    ([*PAIR, "--rtol", "0"], "`rtol` must be finite and above 0"),
    ([*PAIR, "--batch-size", "0"], "`batch-size` must be at least 1"),
    ([*PAIR, "--labels", "cat"], "`labels` must be at least two different names"),
    (["match", "builtin", "--source", "1.png"], "`source` must come with `target`"),
    (["match", "builtin", "--source", "1.png", "--target", "1.png"], "source and target must be different images"),
    (["match", "builtin", "--source", "1.png", "--target", "9.png"], "'9.png' does not exist"),
    (["match", "builtin", "--data", "builtin", "--pairs", "99"], "`pairs` must be at most 12"),
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
    code, out, _ = call(capsys, "match", model, "--max-evals", "3", "--out", "run", "--json")
    assert code == 1
    assert json.loads(out)["model"] == json.loads(out)["rows"][0]["model_id"] == "my-model"
    assert "a-private-place" not in out
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not any(b"a-private-place" in data for data in written)
    code, _, err = call(capsys, "verify", "run")
    assert code == 2
    assert "this run used the local checkpoint 'my-model'" in err
    assert call(capsys, "verify", "run", "--model", model)[0] == 0
    other = save("vit_msn", tmp_path / "other" / "my-model")
    code, out, _ = call(capsys, "verify", "run", "--model", other)
    assert code == 1
    assert "other weights were loaded" in out


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
        cli._run(PAIR)


def test_built_in_model_from_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "hf_equiv", "match", "builtin", "--max-evals", "3", "--no-refine", "--json"]
    search = os.pathsep.join([os.path.dirname(os.path.dirname(cli.__file__)), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
    told = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert json.loads(told.stdout)["rows"][0]["pair_id"] == "cat->coffee"
