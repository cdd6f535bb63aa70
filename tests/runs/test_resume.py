"""Rows of status `error` are made again by the same command; whatever happens meanwhile, no row is lost or doubled."""

import json
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import TinyEncoder, draw_photo, save_photos
from runcases import KilledError, files_of, free_ports, killed_after, python, rows_of

from hf_equiv.analyses import LipschitzConfig, MatchConfig, figures, make_plan, run
from hf_equiv.analyses.plan import Plan
from hf_equiv.analyses.run import VERBS
from hf_equiv.runs import directory, resume, shards
from hf_equiv.runs.schema import LAYOUTS
from hf_equiv.verify.directory import verify_run

TORN = (0, 1, 4)
"""Pairs that fail at first: all but one of the first file of three, and one in the middle of the second."""


@pytest.fixture(autouse=True)
def _three_in_a_file(monkeypatch):
    monkeypatch.setattr(shards, "FILE_ITEMS", 3)
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
    monkeypatch.setattr(figures, "spectrum_figures", lambda *_: {})


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    photos = save_photos(tmp_path_factory.mktemp("photos"))
    return make_plan(MatchConfig(data=str(photos), pairs=7, max_evals=3, refine=False), TinyEncoder())


@pytest.fixture
def with_errors(plan, tmp_path, monkeypatch):
    """A closed run in which some pairs have failed."""
    real = Plan.pixels

    def pixels(self, pair):
        if pair.index in TORN:
            raise ValueError("the disk was away")
        return real(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "pixels", pixels)
        run.run_analysis(plan, tmp_path / "out", batch_size=2)
        assert len(run.run_analysis(plan, tmp_path / "out").errors) == 3  # they were tried, and failed, again
    return tmp_path / "out"


def test_rows_that_failed_are_made_once_the_cause_is_gone(plan, with_errors, tmp_path):
    before = {row["pair_id"]: row for row in shards.read_rows(with_errors)}
    assert resume.refuse_early(with_errors, plan, "missing") == 4
    with pytest.raises(ValueError, match="--overwrite is never"):
        run.run_analysis(plan, with_errors, overwrite="never")
    told = []
    outcome = run.run_analysis(
        plan, with_errors, batch_size=2, observer=lambda p: told.append((p.message, p.done, p.total))
    )
    assert told[0] == ("3 pairs whose rows have status error are tried again", 4, 7)
    run.run_analysis(plan, tmp_path / "whole")
    assert rows_of(with_errors) == rows_of(tmp_path / "whole")
    assert files_of(with_errors) == files_of(tmp_path / "whole")
    assert outcome.errors == {}
    kept = [row for row in outcome.rows if before[row["pair_id"]]["status"] != "error"]
    assert len(kept) == 4
    assert all(row == before[row["pair_id"]] for row in kept)  # `seconds` as well: not made again


def test_a_kill_at_every_step(tmp_path, monkeypatch):
    photos, out, whole = save_photos(tmp_path / "photos"), tmp_path / "out", tmp_path / "whole"
    torn = photos / "class1" / "photo1.png"
    torn.write_bytes(b"torn")
    config = MatchConfig(data=str(photos), pairs=7, max_evals=3, refine=False)
    before = run.run_analysis(make_plan(config, TinyEncoder()), out)
    good = {row["pair_id"] for row in before.rows if row["status"] != "error"}
    assert 1 < len(good) < 6
    draw_photo(1).save(torn)
    plan = make_plan(config, TinyEncoder())
    run.run_analysis(plan, whole)
    for step in range(200):
        place = tmp_path / f"at{step}"
        shutil.copytree(out, place)
        with killed_after(step, monkeypatch):
            try:
                resume.prepare(place, plan, "missing")
                break
            except KilledError:
                pass
        rows = rows_of(place)
        assert good <= set(rows), "a row that was made is gone"
        assert all(rows[name]["status"] == "error" for name in set(rows) - good)
        assert json.loads((place / "run.json").read_text())["complete"] == (step == 0)
        if step % 2 == 0:  # half of them, to be quick
            run.run_analysis(plan, place, batch_size=3)
            assert rows_of(place) == rows_of(whole)
            assert files_of(place) == files_of(whole)
    assert step > 8
    assert set(rows_of(place)) == good


SEVERAL = """
    import os, signal, sys, traceback
    from pathlib import Path
    from fakes import TinyEncoder, draw_photo, save_photos
    from hf_equiv.analyses import figures
    from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
    from hf_equiv.models import encoder  # imported once, and not by each child

    figures.pairs_figure = lambda *_: None
    place, port = Path(sys.argv[1]), sys.argv[2]
    photos, torn = save_photos(place / "photos"), place / "photos" / "class1" / "photo1.png"
    torn.write_bytes(b"torn")

    def make(tell=None):
        plan = make_plan(MatchConfig(data=str(photos), pairs=12, max_evals=10, refine=False), TinyEncoder())
        return run_analysis(plan, place / "out", batch_size=1, observer=tell)

    def kill(progress):
        if progress.stage == "match":
            os.kill(os.getpid(), signal.SIGKILL)

    def fork(rank, count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                           "LOCAL_RANK": str(rank), "MASTER_PORT": port} if count > 1 else {}
            code = 99
            try:
                code = len(make(kill if rank else None).errors)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return child

    def ends(*children):
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))

    ends(fork(0, 1))
    draw_photo(1).save(torn)
    ends(fork(0, 2), fork(1, 2))
"""


def test_a_mended_photo_two_processes_and_a_kill(tmp_path, monkeypatch):
    told = python(SEVERAL, tmp_path, *free_ports(1))
    failed, ends = told.stdout.splitlines()
    assert 1 < int(failed) < 12, told.stderr
    assert ends in (f"0 {-signal.SIGKILL}", "0 0"), told.stderr  # 0 0: the first process was quicker
    config = MatchConfig(data=str(tmp_path / "photos"), pairs=12, max_evals=10, refine=False)
    run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")  # the new revision is in every row
    monkeypatch.setattr("hf_equiv.models.encoder.Encoder.from_pretrained", lambda *_, **__: TinyEncoder())
    assert verify_run(tmp_path / "out").holds


def test_a_set_that_changed_elsewhere_is_refused_all_the_same(tmp_path):
    photos = save_photos(tmp_path / "photos")
    config = MatchConfig(data=str(photos), pairs=12, max_evals=10, refine=False)
    torn = photos / "class1" / "photo1.png"
    torn.write_bytes(b"torn")
    run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / "out")
    before = rows_of(tmp_path / "out")
    draw_photo(1).save(torn)
    draw_photo(12).save(photos / "class0" / "photo0.png")
    with pytest.raises(ValueError, match="other settings: the photos changed"):
        run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / "out")
    draw_photo(0).save(photos / "class0" / "photo0.png")
    draw_photo(13).save(photos / "class9.png")  # a new one: other pairs would be drawn
    with pytest.raises(ValueError, match="other settings: the photos changed"):
        run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / "out")
    assert rows_of(tmp_path / "out") == before


@pytest.mark.parametrize("analysis", ["spectrum", "lipschitz", "walk"])
def test_images_that_failed_are_analysed_again(analysis, tmp_path):
    options = {
        "spectrum": {"k": 2, "vectors": True},
        "lipschitz": {"directions": "random:1,toward"},
        "walk": {"num_steps": 2, "step": 0.3},
    }
    photos, layout = save_photos(tmp_path / "photos", 4), LAYOUTS[analysis]
    photo = photos / "class0" / "photo0.png"
    photo.write_bytes(b"torn")

    def make(out):
        config = VERBS[analysis].CONFIG(data=str(photos), **options[analysis])
        return run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / out)

    def rows(out):
        found = shards.read_rows(tmp_path / out, images=True, layout=layout)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    def floats(out):
        return {path.name: path.read_bytes() for path in (tmp_path / out / "float").glob("*")}

    assert len(make("out").errors) == (2 if analysis == "lipschitz" else 1)  # one is measured toward it
    draw_photo(0).save(photo)
    assert make("out").errors == make("whole").errors == {}
    assert rows("out") == rows("whole")
    assert floats("out") == floats("whole")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"]


def test_nothing_of_a_failed_row_stays(tmp_path):
    photos, layout = save_photos(tmp_path / "photos", 3), LAYOUTS["lipschitz"]
    config = LipschitzConfig(data=str(photos), directions="random:1,toward")
    plan, out = make_plan(config, TinyEncoder()), tmp_path / "out"
    run.run_analysis(plan, out)
    (path,) = shards.shard_files(out, layout)
    found = shards.read_shard(path, images=True, layout=layout)
    name = found[0]["image_id"]
    found[1]["status"] = "error"  # of one direction alone: all of the image are made again
    path.write_bytes(shards.shard_bytes(found, layout, {}))
    places = {subject.name: subject.index for subject in plan.items}
    resume.take_out(out, layout, places, plan.settings["data_revision"])
    (path,) = shards.shard_files(out, layout)
    assert path.name == "part-00001.parquet"
    assert len(shards.read_shard(path, layout=layout)) == 4
    left = shards.read_floats(out / "float" / "part-00001.safetensors")[0]
    assert len(left) == 2
    assert not any(key.startswith(name) for key in left)
    assert len(list((out / "float").iterdir())) == 1


def test_a_photo_that_is_torn_again_leaves_no_other_revision(tmp_path, monkeypatch):
    """Mended, killed while the rows were rewritten, and torn again: every row states the revision of the run."""
    photos, out = save_photos(tmp_path / "photos"), tmp_path / "out"
    torn = photos / "class1" / "photo1.png"
    torn.write_bytes(b"torn")
    config = MatchConfig(data=str(photos), pairs=7, max_evals=3, refine=False)
    run.run_analysis(make_plan(config, TinyEncoder()), out)
    before = rows_of(out)
    draw_photo(1).save(torn)
    real, left = directory.save_record, iter(range(1))

    def killed(*arguments, **options):
        if next(left, None) is None:
            raise KilledError
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "save_record", killed)
        with pytest.raises(KilledError):
            run.run_analysis(make_plan(config, TinyEncoder()), out)
    torn.write_bytes(b"torn")
    run.run_analysis(make_plan(config, TinyEncoder()), out)
    assert rows_of(out) == before


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(tmp_path):
    """A table of paths has the same SHA-256 whatever lies there."""
    names = [str(tmp_path / f"{k}.png") for k in range(6)]
    for k, name in enumerate(names):
        draw_photo(k).save(name)
    pq.write_table(pa.table({"image": names}), tmp_path / "paths.parquet")
    config = MatchConfig(data=str(tmp_path / "paths.parquet"), pairs=3, max_evals=3, refine=False)

    def stop(progress):
        if progress.done > 0:
            raise KilledError

    with pytest.raises(KilledError):
        run.run_analysis(
            make_plan(config, TinyEncoder(), cache_dir=str(tmp_path / "cache")),
            tmp_path / "out",
            batch_size=1,
            observer=stop,
        )
    before = rows_of(tmp_path / "out")
    for k, name in enumerate(names):
        draw_photo(k + 20).save(name)
    plan = make_plan(config, TinyEncoder(), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="other images under the same names"):
        run.run_analysis(plan, tmp_path / "out")
    assert rows_of(tmp_path / "out") == before
    assert len(run.run_analysis(plan, tmp_path / "out", overwrite="always").rows) == 3
