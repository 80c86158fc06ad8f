"""The picture and the table that strangers see first: equal to what is committed, and to the records."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import headline
import pytest
from benching import changed
from pages import formats, real
from pages.files import timed
from records import Record, Results
from suite import HERE

from toolchain.errors import ArtifactError

RESULTS = Results(HERE / "results")


@pytest.fixture(scope="module")
def drawn():
    return headline.drawn(RESULTS)


def test_what_is_committed_follows_from_the_records(drawn):
    assert {path.name: path.read_text(encoding="utf-8") == text for path, text in drawn.items()} == dict.fromkeys(
        (path.name for path in drawn), True
    ), "run `make bench-report`"
    assert {path.name for path in drawn} >= {"results.svg", "results.md"}


def test_a_page_has_the_table_between_its_marks_or_not_at_all():
    page = f"before\n\n{headline.BEGIN}\n\nold\n\n{headline.END}\n\nafter\n"
    assert headline.within(page, "new\n") == f"before\n\n{headline.BEGIN}\n\nnew\n\n{headline.END}\n\nafter\n"
    assert headline.within("before\n", "new\n") == "before\n"
    assert headline.within(f"before\n{headline.BEGIN}\n", "new\n") == f"before\n{headline.BEGIN}\n"


def test_the_table_has_the_rows_of_the_records_and_the_instruction_set():
    rows = [line.split(" | ") for line in headline.table(RESULTS).splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 8
    record = RESULTS.read("targets", "fashion_mnist_vit")
    pairs, _ = timed(record, RESULTS)
    dense, *files = record.result["artifacts"]
    half = next(row for row in files if row["precision"] == "fp32")
    assert rows[4][2:5] == [f"{dense['bytes'] / 1e6:.2f} MB", "100.0 %", f"{100 - dense['wrong'] / 100:.2f} %"]
    assert rows[5][3] == f"{100 * half['bytes'] / dense['bytes']:.1f} %"
    bound = pairs["fp32"].verified_speedup_at_least
    assert rows[5][5] == f"{pairs['fp32'].latency_ms('B'):.2f} ms"
    assert 0 <= bound - float(re.fullmatch(r"≥ ([\d.]+) \|", rows[5][6])[1]) < 0.01
    four = next(row for row in files if row["precision"] == "int4")
    assert rows[7][1:4] == [
        "half of the parameters, int4",
        f"{four['bytes'] / 1e6:.2f} MB",
        f"{100 * four['bytes'] / dense['bytes']:.1f} %",
    ]
    caption = headline.table(RESULTS).splitlines()[-1]
    assert "AMX-INT8" in caption
    plain = re.search(
        r"without AMX the speedup of half a DeiT-S is ≥ ([\d.]+) in fp32 and ≥ ([\d.]+) in int8-dynamic \((.*?);",
        caption,
    )
    timed_plain = formats.timed(RESULTS.read(*headline.PLAIN), RESULTS)
    for bound, precision in zip(plain.groups(), ("fp32", "int8-dynamic"), strict=False):
        assert 0 <= timed_plain["ort-cpu", precision].verified_speedup_at_least - float(bound) < 0.01
    assert "AMX" not in plain[3]
    assert pairs["fp32"].environment["cpu"] in caption


def test_the_picture_has_a_mark_for_each_file_and_follows_light_and_dark():
    text = headline.picture(RESULTS)
    root = ET.fromstring(text)
    marks = [each for each in root.iter() if each.tag.endswith("polygon")]
    files = len(headline.files(RESULTS, headline.DRAWN))
    assert len(marks) == 2 * files + len(headline.SERIES)
    assert "@media (prefers-color-scheme: dark)" in text
    assert "AMX-INT8" in text
    assert "<script" not in text
    xs = [float(x) for x in re.findall(r"translate\((\d+\.\d)", text)][:files]
    assert xs[0] == max(xs), "the dense file has the most bytes"


@pytest.mark.slow
def test_another_record_is_another_picture_and_table(tmp_path):
    results = Results(tmp_path)
    for name in headline.MODELS:
        record = RESULTS.read("targets", name)
        for each in (record, *RESULTS.below("targets", name)):
            results.save(each)
    assert headline.picture(results) == headline.picture(RESULTS)
    artifacts = [
        {**row, "bytes": row["bytes"] + 100_000 * (row["model"] == "compressed")} for row in record.result["artifacts"]
    ]
    results.save(changed(record, artifacts=artifacts))
    assert headline.picture(results) != headline.picture(RESULTS)
    assert headline.table(results) != headline.table(RESULTS)


def test_without_the_records_it_says_what_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match="deit_small"):
        headline.table(Results(tmp_path))


def backbone_record(cell, share, probe=False):
    """A made-up record of the suite `real`."""
    figures = {"wrong": [1 - share] * 4, "spread": [1.0] * 4}
    counted = {"total": 400, "wrong": round(85 / share), "correct": ""}
    names = [*(f"objects_a/{n}" for n in range(4)), *(f"stamps_b/{n}" for n in range(4))]
    figures = {"wrong": [*figures["wrong"], *(x / 2 for x in figures["wrong"])], "spread": 2 * figures["spread"]}
    judge = {"names": names, "class": figures, "patches": figures}
    result = {
        "params": round(1000 * share),
        "bytes": round(4e6 * share),
        "dense": {"params": 1000},
        "sets": {
            "judge": {**judge, "neighbours": {"total": 4, "wrong": 1, "correct": ""}},
            "drawings": {
                "names": ["a"],
                **{key: {"wrong": [2 - 2 * share], "spread": [1.0]} for key in ("class", "patches")},
            },
        },
        **({"probe": {"test": counted}} if probe else {}),
    }
    definition = {"row": cell, "peer": False}
    return Record(
        "real", f"{cell}.zero", "backbone", "", definition, result, {"cpu": "made up"}, seconds={"compress": 60}
    )


def test_a_pretrained_model_stands_first_once_all_its_rows_are_recorded(tmp_path):
    results = Results(tmp_path)
    assert headline.pretrained_table(results) == ""
    for row, share in (("dense.features", 1.0), ("joint.features.params0.75", 0.75), ("joint.features.params0.5", 0.5)):
        results.save(backbone_record(row, share))
    assert headline.pretrained_table(results) == "", "a row is missing"
    results.save(backbone_record("joint.features.params0.35", 0.35))
    results.save(backbone_record("joint.probe.params0.5", 0.5, probe=True))
    rows = [line.split(" | ") for line in headline.pretrained_table(results).splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| dense", *(f"| {share} % of the parameters" for share in (75, 50, 35))]
    assert [row[2] for row in rows][::2] == ["0", "0.500 [0.500, 0.500]"]
    assert [row[3] for row in rows] == [row[2] for row in rows], "patches, of photographs as well"
    assert rows[2][4] == "1.000 [1.000, 1.000]", "drawings stand apart"
    assert rows[2][5:] == ["3 of 4", "170 of 400", "60 s |"]
    assert rows[1][6] == "–", "no probe was measured at that size"


def test_the_numbers_in_the_readmes_sentences_are_those_of_the_records():
    prose = (headline.ROOT / "README.md").read_text(encoding="utf-8").partition(headline.BEGIN)[0]
    dense, half = (
        RESULTS.read("real", f"{row}.zero").result["probe"]["test"] for row in ("dense.probe", "joint.probe.params0.5")
    )
    features = RESULTS.read("real", "joint.features.params0.5.zero")
    objects, drawings = (
        real.error(features, *of).y for of in (("judge", "class", real.PARTS["objects"]), ("drawings", "class"))
    )
    said = " ".join(prose.split())
    assert (
        f"Of {dense['total']} test images of Fashion-MNIST, a DINOv2 with a linear classifier gets {dense['wrong']} wrong"
        in said
    )
    assert f"half of it, calibrated on that data set, gets {half['wrong']} wrong" in said
    assert f"has {objects:.2f} on photographs of other subjects, and {drawings:.2f} on drawings" in said


def test_links_of_a_fragment_lead_to_the_same_file_from_every_page():
    text = "[rows](benchmarks/results/real/README.md)"
    assert headline.placed(text, headline.ROOT / "README.md") == text
    below = headline.placed(text, headline.ROOT / "models" / "any" / "README.md")
    assert below == "[rows](../../benchmarks/results/real/README.md)"
    inside = headline.placed("[a](docs/precision.md) [b](https://example.org)", headline.ROOT / "docs" / "results.md")
    assert inside == "[a](precision.md) [b](https://example.org)"
