"""Several processes on one run: the same rows for any number of them, also after a kill."""

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import TinyEncoder, draw_photo, save_photos
from runcases import COMMAND, ROOT, SCRIPT, Process, free_ports, python

from hf_equiv.analyses import MatchConfig, make_plan, run
from hf_equiv.cli.main import _run
from hf_equiv.runs import processes, shards
from hf_equiv.runs.schema import LAYOUTS

MAIN, OTHER = (SimpleNamespace(num_processes=2, is_main_process=main) for main in (True, False))

SEVERAL = """
    import os, sys, traceback
    from pathlib import Path
    import torch
    from fakes import TinyEncoder
    from hf_equiv.cli.progress import run_progress
    from hf_equiv.analyses import MatchConfig, figures, make_plan, run_analysis
    from hf_equiv.analyses.run import VERBS
    from hf_equiv.models import encoder  # imported once, and not by each child

    figures.pairs_figure = lambda *_: None  # a second each
    figures.spectrum_figures = figures.lipschitz_figures = figures.walk_figures = lambda *_, **__: {}
    torch.set_num_threads(1)
    photos, place, *ports = sys.argv[1:]
    options = {"spectrum": {}, "walk": {"num_steps": 3, "step": 0.3},
               "lipschitz": {"directions": "random:1,top:1,null:2"}}

    def make(verb, out):
        if verb == "match":
            plan = make_plan(MatchConfig(data=photos, pairs=7, max_evals=12), TinyEncoder())
        else:
            plan = make_plan(VERBS[verb].CONFIG(data=photos, limit=4, **options[verb]), TinyEncoder())
        with run_progress(quiet=False, what="rows" if verb == "match" else "images") as tell:
            if verb == "match":
                return run_analysis(plan, out, batch_size=2, observer=tell)
            return run_analysis(plan, out, batch_size=(5, 7, 32)[int(out.name[-1]) - 1], observer=tell)

    for verb in ("match", "spectrum", "lipschitz", "walk"):
        for count in (1, 2, 3) if verb == "match" else (1, 3):
            port, children = ports.pop(), []
            for rank in range(count):
                child = os.fork()
                if child == 0:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                                   "LOCAL_RANK": str(rank), "MASTER_PORT": port} if count > 1 else {}
                    code = 1
                    try:
                        outcome = make(verb, Path(place, f"{verb}{count}"))
                        code = 0 if outcome.main == (rank == 0) and outcome.summary else 2
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)
                children.append(child)
            assert all(os.waitpid(child, 0)[1] == 0 for child in children), (verb, count)
"""


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> SimpleNamespace:
    place = tmp_path_factory.mktemp("several")
    told = python(SEVERAL, save_photos(place / "photos"), place, *free_ports(9))
    assert told.returncode == 0, told.stderr
    return SimpleNamespace(place=place, told=told.stderr.splitlines())


@pytest.mark.parametrize("verb", LAYOUTS)
def test_rows_and_files_are_those_of_one_process(several, verb):
    layout = LAYOUTS[verb]

    def rows(count):
        found = shards.read_rows(several.place / f"{verb}{count}", images=True, layout=layout)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    def floats(count):
        folder = several.place / f"{verb}{count}" / "float"
        return {path.name: path.read_bytes() for path in folder.glob("*")}

    assert len({row[layout.item] for row in rows(1)}) == (7 if verb == "match" else 4)

    def names(count):
        return sorted(path.name for path in (several.place / f"{verb}{count}").rglob("*"))

    for count in (2, 3) if verb == "match" else (3,):
        assert rows(count) == rows(1)
        assert floats(count) == floats(1)
        assert names(count) == names(1)
        assert json.loads((several.place / f"{verb}{count}" / "run.json").read_text())["complete"]


def test_every_rank_says_what_it_does_and_counts_all_rows(several):
    assert "rank 0: 2 processes share 7 rows" in several.told
    assert "rank 2: 3 processes share 4 images" in several.told
    assert "rank 0: 7 of 7 rows on disk" in several.told
    assert "0 of 7 rows on disk" in several.told  # of a single process, which has no name


def test_blocks_end_together_and_at_file_boundaries():
    items = [SimpleNamespace(index=i) for i in range(5, 105)]
    for count in (1, 2, 5):
        blocks = processes.cut_blocks(items, 8, count, 20)
        assert [item for block in blocks for item in block] == items
        assert all(len({item.index // 20 for item in block}) == 1 for block in blocks)
        assert max(map(len, blocks)) <= 8
        assert len(blocks[-1]) == 1 or count == 1
    assert processes.cut_blocks([], 8, 2, 20) == []


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="2 processes were started but they do not see each other"):
        processes.join(torch.device("cpu"))


def test_a_launcher_that_starts_one_process_is_noticed(monkeypatch):
    alone, blocks = SimpleNamespace(num_processes=1), [[1, 2], [3]]
    assert processes.describe(alone, blocks, "rows") == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes.describe(alone, blocks, "rows").startswith("1 process works on 3 rows; for more, launch with")


@pytest.fixture
def hold():
    """Start a process that holds block 3 until it is killed or told to leave; a fork, which pays for no import."""
    children = []

    def start(folder: Path, role: SimpleNamespace) -> SimpleNamespace:
        (seen, told), (wait, leave) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(seen)
                os.close(leave)
                with processes.Claims(folder, role) as claims:
                    os.write(told, b"yes" if claims.take(3) else b"no")
                    os.read(wait, 1)
            finally:
                os._exit(0)
        os.close(told)
        os.close(wait)
        children.append(child)
        assert os.read(seen, 3) == b"yes"

        def end(kill: bool) -> None:
            os.kill(child, signal.SIGKILL) if kill else os.write(leave, b".")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGKILL if kill else 0)
            children.remove(child)

        return SimpleNamespace(kill=lambda: end(True), leave=lambda: end(False))

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_block_whose_owner_was_killed_is_taken_over(hold, tmp_path):
    with processes.Claims(tmp_path, MAIN) as claims:
        child = hold(tmp_path, OTHER)
        assert claims.take(2)
        assert not claims.take(3)
        child.kill()
        claims.wait_for(3, lambda: None)
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_main_process_that_was_killed_is_told(hold, tmp_path):
    child = hold(tmp_path, MAIN)
    with processes.Claims(tmp_path, OTHER) as claims:
        assert not claims.take(3)
        assert claims.take(4)
        child.kill()
        with pytest.raises(RuntimeError, match=r"the main process has ended .* Its rows are kept: run the same"):
            claims.wait_for_close()


def test_no_block_is_taken_once_the_list_is_closed(hold, tmp_path):
    child = hold(tmp_path, MAIN)
    with processes.Claims(tmp_path, OTHER) as other:
        assert other.take(0)
        child.leave()
        assert not other.take(1)
        other.wait_for_close()


@pytest.mark.parametrize("stale", [False, True], ids=["no list", "list of an earlier launch"])
def test_a_folder_that_is_not_that_of_the_main_process_is_told(stale, tmp_path):
    if stale:
        (tmp_path / ".claims").touch()
    told = r"`--out` must be one folder for all processes.* Give a path that all nodes"
    with pytest.raises(ValueError, match=told), processes.Claims(tmp_path, OTHER):
        pass


def test_two_nodes_give_the_rows_of_one_process(tmp_path):
    work = ["match", "builtin-64", "--data", "builtin", "--pairs", "3", "--max-evals", "20", "--rtol", "0.9"]
    work += ["--no-refine"]

    def nodes(*folders: Path) -> list[subprocess.CompletedProcess]:
        given = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_ports(1)[0]}"}
        started = []
        for rank, folder in enumerate(folders):
            folder.mkdir(exist_ok=True)
            started.append(Process(COMMAND, *work, "--out", "two", cwd=folder, RANK=f"{rank}", **given))
        return [node.end() for node in started]

    apart = nodes(tmp_path / "here", tmp_path / "there")  # two disks
    assert [node.returncode for node in apart] == [2, 2]
    assert "another process of this run has ended before the work was shared" in apart[0].stderr
    assert "is not the folder of the main process. Give a path that all nodes share." in apart[1].stderr
    shared = nodes(tmp_path, tmp_path)
    assert [node.returncode for node in shared] == [0, 0], shared
    assert "rank 1: 2 processes share 3 rows" in shared[1].stderr
    assert ["hf-equiv verify two" in node.stdout for node in shared] == [True, False]
    assert _run([*work, "--out", str(tmp_path / "one")]) == 0
    one, two = (
        [row | {"seconds": 0} for row in shards.read_rows(tmp_path / name, images=True, layout=LAYOUTS["match"])]
        for name in ("one", "two")
    )
    assert len(one) == 3
    assert one == two


def test_kills_lose_double_and_damage_nothing():
    told = python(SCRIPT, ROOT / "scripts" / "bench" / "kills.py", "--kills", "5", "--pairs", "6")
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.startswith("5 kills in ") or "\n5 kills in " in told.stdout


def test_accelerate_launch(tmp_path):
    """Which starts the processes by torchrun."""
    script = "from accelerate.commands.launch import main; main()"
    given = ["--multi_gpu", "--num_processes", "2", f"--main_process_port={free_ports(1)[0]}", "-m", "hf_equiv"]
    given += ["spectrum", "builtin-64", "--k", "2", "--out", "out"]
    told = python(script, *given, cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert told.returncode == 0, told.stderr
    assert "rank 1: 2 processes share 4" in told.stderr
    assert told.stdout.count("hf-equiv verify out") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"]


def test_a_process_that_sees_other_photos_makes_no_row(hold, tmp_path, monkeypatch):
    photos, out = save_photos(tmp_path / "photos"), tmp_path / "out"
    config = MatchConfig(data=str(photos), pairs=2, max_evals=5, refine=False)
    run.run_analysis(make_plan(config, TinyEncoder()), out)
    draw_photo(11).save(photos / "class0" / "photo0.png")  # between the planning of one process and of another
    hold(out, MAIN)
    other = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(processes, "join", lambda _: other)
    with pytest.raises(ValueError, match="other settings: the photos changed"):
        run.run_analysis(make_plan(config, TinyEncoder()), out)
