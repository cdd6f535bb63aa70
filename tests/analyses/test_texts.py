"""Runs whose targets are texts, checked with transformers alone and by `verify`."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from fakes import draw_photo, reseal
from hubcases import call
from PIL import Image
from runcases import rows_of
from tiny_models import SIZE, save
from tiny_texts import save_words

from hf_equiv import Encoder, MatchConfig, make_plan, run_analysis, verify_run
from hf_equiv.data.text_set import load_texts
from hf_equiv.hub import publish_results

TEXTS = ("a photo of a cat", "dog", "a dog . a cat .")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_words(save("clip", folder / "clip"), "red", "old")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(place):
    return Encoder.from_pretrained(place / "clip", normalize=True)


@pytest.fixture(scope="module")
def finished(place, encoder):
    config = MatchConfig(
        model=str(place / "clip"), data="builtin", texts=str(place / "texts.txt"), pairs=5, labels=("cat", "dog")
    )
    return run_analysis(make_plan(config, encoder), place / "out")


def test_rows_are_those_of_the_plain_model(finished, place):
    model = transformers.AutoModel.from_pretrained(place / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(place / "clip")
    tokens = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        texts = torch.nn.functional.normalize(model.get_text_features(**kept).pooler_output, dim=1).double()
    table = pq.read_table(next((finished.out / "matches").glob("*.parquet"))).to_pylist()
    assert len(table) == len({(row["source_id"], row["target_text"]) for row in table}) == 5
    for row in table:
        assert row["target"] is row["target_label"] is row["same_top1"] is row["target_quantization_error"] is None
        seen = {}
        for name in ("source", "match"):
            image = Image.open(io.BytesIO(row[name]["bytes"]))
            assert image.size == (SIZE, SIZE)
            v = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                seen[name] = torch.nn.functional.normalize(model.get_image_features(v).pooler_output, dim=1)[0].double()
        k = TEXTS.index(row["target_text"])
        for name, column in (("match", "text_rank"), ("source", "source_text_rank")):
            near = texts @ seen[name]
            assert row[column] == 1 + int((near > near[k]).sum())
        assert row["cosine_to_text"] == pytest.approx(float(texts[k] @ seen["match"]), abs=1e-6)
        assert row["cosine_source_target"] == pytest.approx(float(texts[k] @ seen["source"]), abs=1e-6)
        assert row["embedding_error_8bit"] == pytest.approx(float((seen["match"] - texts[k]).norm()), abs=1e-6)
        assert row["embedding_error"] <= 1e-5
        assert row["cosine_to_text"] > 0.9999
        assert row["text_rank"] == 1


def test_the_summary_has_three_controls(finished, encoder):
    summary, rows = finished.summary, rows_of(finished.out).values()
    assert summary["text"]["nearest"] == 5
    assert summary["text"]["candidates"] == 3  # the usual texts have no word that this tokenizer knows
    b = summary["baseline"]
    photos = {row["source_id"]: row["source"] for row in rows}
    assert len(photos) > 1
    z = torch.cat([encoder(encoder.preprocess([Image.open(io.BytesIO(png))])) for png in photos.values()]).double()
    two = (z @ z.T)[torch.ones(len(z), len(z)).triu(1).bool()]
    assert b["two_photos"]["max"] == pytest.approx(float(two.max()), abs=1e-6)
    assert b["cosine"]["min"] >= float((z @ encoder.embed_texts(TEXTS).double().T).min()) - 1e-6
    assert b["own_class"] is not None
    assert "Median cosine to the text: 1.00000" in summary["verdict"]


def test_verify_holds_and_finds_changes(finished, place, tmp_path, capsys):
    assert not verify_run(finished.out, model=str(place / "clip")).problems
    record = json.loads((finished.out / "run.json").read_text())
    assert "--texts texts.txt" in record["command"]
    assert str(place) not in json.dumps(record)
    for what, change in {
        "text": lambda row: row | {"target_text": TEXTS[(TEXTS.index(row["target_text"]) + 1) % 3]},
        "rank": lambda row: row | {"text_rank": 2},
        "cosine": lambda row: row | {"cosine_to_text": row["cosine_to_text"] - 1e-3},
    }.items():
        out = shutil.copytree(finished.out, tmp_path / what)
        path = next((out / "matches").glob("*.parquet"))
        table = pq.read_table(path)
        rows = table.to_pylist()
        rows[0] = change(rows[0])
        pq.write_table(type(table).from_pylist(rows, table.schema), path)
        reseal(out)
        assert verify_run(out, model=str(place / "clip")).problems, what


def test_a_published_run_of_withheld_photos_holds(finished, place, hub, tmp_path):
    publish_results(finished.out, "alice/texts")
    out = tmp_path / "again"
    for name, data in hub.files("datasets", "alice/texts").items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    assert json.loads((out / "run.json").read_text())["photos"] == "withheld"
    assert [problem.column for problem in verify_run(out).problems] == ["photos"]  # settings and statuses hold


def test_one_text_from_the_command_line(place, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    arguments = ["match", str(place / "clip"), "--source", str(tmp_path / "a.png"), "--target-text", "a dog"]
    code, out, _ = call(capsys, *arguments, "--out", tmp_path / "out", "--json")
    assert code == 0
    told = json.loads(out)
    (row,) = told["rows"]
    assert row["target_text"] == "a dog"
    assert row["pair_id"] == "a.png->a dog"
    assert told["summary"]["baseline"] is None
    assert call(capsys, "verify", tmp_path / "out", "-q")[0] == 0


BAD = {
    "a vision model": (
        ["builtin", "--source", "builtin", "--target-text", "a"],
        "must come with a model of images and",
    ),
    "both targets": (
        ["CLIP", "--source", "builtin", "--target", "builtin", "--target-text", "a"],
        "must not be combined",
    ),
    "no source": (["CLIP", "--target-text", "a"], "--target must come with --source"),
    "texts alone": (
        ["CLIP", "--source", "builtin", "--target", "builtin", "--texts", "a.txt"],
        "--texts must come with",
    ),
    "no such file": (["CLIP", "--data", "builtin", "--texts", "no.txt"], "'no.txt' does not exist"),
    "empty": (["CLIP", "--source", "builtin", "--target-text", "  "], "must hold at least one text"),
    "control": (["CLIP", "--source", "builtin", "--target-text", "a\x1b[31m"], "must have no control characters"),
    "reordered": (["CLIP", "--source", "builtin", "--target-text", "a \u202ecat"], "must have no control characters"),
    "too long": (["CLIP", "--source", "builtin", "--target-text", "cat " * 16], "at most 16 tokens"),
    "unknown": (["CLIP", "--source", "builtin", "--target-text", "zebra"], "words that the tokenizer knows"),
    "too many pairs": (["CLIP", "--data", "builtin", "--texts", "TEXTS", "--pairs", "13"], "at most 12 for 4 images"),
    "joint": (["builtin", "builtin-64", "--source", "builtin", "--target-text", "a"], "one encoder of unit embeddings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(place, case, capsys, tmp_path):
    words, message = BAD[case]
    known = {"CLIP": str(place / "clip"), "TEXTS": str(place / "texts.txt")}
    code, _, told = call(capsys, "match", *(known.get(word, word) for word in words), "--out", tmp_path / "out")
    assert code == 2
    assert message in told


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "Some.TXT"
    path.write_bytes("\ufeffein Hund \n\n“déjà vu”\r\n".encode() + b"x" * 80 + b"\n" + b"x" * 80)
    texts = load_texts(str(path))
    assert texts.texts == ("ein Hund", "“déjà vu”", "x" * 80, "x" * 80)
    assert texts.ids == ("ein Hund", "“déjà vu”", "x" * 59 + "…", "x" * 59 + "…#3")
    assert texts.data_id == "Some.TXT"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        load_texts(str(path))


def test_hostile_rows_and_settings_are_problems_and_no_crash(finished, place, tmp_path):
    def changed(name, cell=None, **settings):
        out = shutil.copytree(finished.out, tmp_path / name)
        path = next((out / "matches").glob("*.parquet"))
        table = pq.read_table(path)
        rows = [row | (cell or {}) for row in table.to_pylist()]
        pq.write_table(type(table).from_pylist(rows, table.schema), path)
        reseal(out)
        record = json.loads((out / "run.json").read_text())
        record["settings"] = {k: v for k, v in record["settings"].items() if k not in settings}
        record["settings"] |= {k: v for k, v in settings.items() if v is not None}
        (out / "run.json").write_text(json.dumps(record))
        return out

    assert verify_run(changed("no text", {"target_text": None}), model=str(place / "clip")).problems
    assert verify_run(changed("no setting", target_texts=None, usual_texts=None), model=str(place / "clip")).problems
    assert verify_run(changed("other texts", target_texts=["a", "dog"]), model=str(place / "clip")).problems
    with pytest.raises(ValueError, match=r"a valid value of settings\.target_texts"):
        verify_run(changed("no texts", target_texts=[5]), model=str(place / "clip"))


def test_a_report_speaks_of_the_text(finished, tmp_path, capsys):
    code, told, _ = call(capsys, "report", finished.out, "--out", tmp_path / "page.html")
    assert code == 0
    assert "gave the photo the text's embedding" in told
    assert "between unrelated photos and texts" in told
    assert "no longer nearer to the text" in told
    page = (tmp_path / "page.html").read_text()
    assert "it is number 1 of the candidate texts" in page
    for option, value in (("--transfer", "builtin"), ("--defences", "jpeg:75")):
        code, _, told = call(capsys, "report", finished.out, option, value, "--out", tmp_path / "other.html")
        assert code == 2
        assert f"{option} must come with matches of images" in told


def test_photos_without_classes_or_with_names_of_no_known_word(encoder, tmp_path):
    (tmp_path / "photos" / "zebra").mkdir(parents=True)
    draw_photo(1, 40).save(tmp_path / "photos" / "zebra" / "a.png")
    draw_photo(2, 40).save(tmp_path / "photos" / "zebra" / "b.png")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for photos in (tmp_path / "photos", tmp_path / "photos" / "zebra"):
        config = MatchConfig(data=str(photos), texts=str(tmp_path / "texts.txt"), pairs=2, max_evals=20)
        summary = run_analysis(make_plan(config, encoder), tmp_path / "out" / photos.name).summary
        assert summary["baseline"]["own_class"] is None
        assert summary["baseline"]["cosine"]["median"] < 1
