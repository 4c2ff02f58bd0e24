"""Figures against an independent computation; the report's form; the picture."""

import json
import math
import statistics
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlike.bench.client import RequestRecord
from maxlike.bench.figures import Distribution, LevelFigures, Objectives
from maxlike.bench.load import Load
from maxlike.bench.plot import check_plot, plot
from maxlike.bench.report import (
    SCHEMA_VERSION,
    check_writable,
    document,
    level_text,
    summary_text,
    write_json,
)


def record(ttft: float, between: float, n: int, start: float = 50.0, **fields: Any) -> RequestRecord:
    chunks = [start + ttft + i * between for i in range(n)]
    return RequestRecord(due=start, sent=start, chunks=chunks, finished=chunks[-1], output_tokens=n, prompt_tokens=20,
                         has_usage=True, finish_reason="length", **fields)


def level(rate: float, slow: float = 1.0, n: int = 20) -> LevelFigures:
    rng = np.random.default_rng(0)
    records = [record(slow * rng.uniform(0.1, 0.9), slow * 0.01, 8, 50 + i / rate if rate < math.inf else 50.0)
               for i in range(n)]
    return LevelFigures.of(Load(rate), records)


def failed(rate: float) -> LevelFigures:
    return LevelFigures.of(Load(rate), [RequestRecord(0.0, 0.0, [], 0.5, error="HTTP 429", message="full")])


def test_distribution_against_the_standard_library() -> None:
    values = np.random.default_rng(2).lognormal(size=237).tolist()
    found = Distribution.of(values)
    assert found is not None
    cuts = statistics.quantiles([1e3 * value for value in values], n=100, method="inclusive")
    assert (found.median, found.p90, found.p95, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[94], cuts[98]))
    assert found.mean == pytest.approx(1e3 * statistics.fmean(values))
    assert found.max == 1e3 * max(values)
    assert Distribution.of([]) is None
    assert Distribution.of([0.5]) == Distribution(500, 500, 500, 500, 500, 500)


def test_figures_of_records() -> None:
    records = [record(0.5, 0.1, 11, start=10.0, cached_tokens=16), record(1.5, 0.2, 6, start=12.0),
               record(1.0, 0.3, 1, start=11.0)]
    records[1].has_usage = False
    records[0].output_tokens = 20
    records[0].finished = 10 + 0.5 + 1.9
    records[2].sent = 11.25  # a quarter of a second late
    figures = LevelFigures.of(Load(1.0), records)
    assert figures.duration_s == pytest.approx(4.5)  # 10 to 12 + 1.5 + 1
    assert (figures.output_tokens, figures.prompt_tokens, figures.cached_prompt_tokens) == (27, 60, 16)
    assert figures.without_usage == 1
    assert figures.tokens_per_piece == 1.5
    assert figures.prompt_tokens_per_s == pytest.approx(60 / 4.5)
    assert figures.ttft_ms is not None and figures.itl_ms is not None and figures.send_delay_ms is not None
    assert figures.tpot_ms is not None and figures.e2e_ms is not None
    assert figures.ttft_ms.mean == pytest.approx(1e3 * (0.5 + 1.5 + 0.75) / 3)
    assert figures.tpot_ms.mean == pytest.approx(150)  # the output of one token has none
    assert figures.itl_ms.mean == pytest.approx(1e3 * (10 * 0.1 + 5 * 0.2) / 15)  # every gap counts once
    assert figures.e2e_ms.max == pytest.approx(2500)
    assert figures.send_delay_ms.max == pytest.approx(250)
    assert (figures.goodput_requests_per_s, figures.good_share) == (None, None)


def test_nothing_succeeded() -> None:
    figures = failed(2.0)
    assert (figures.completed, figures.rejected, figures.requests_per_s) == (0, 1, 0)
    assert figures.ttft_ms is None
    assert figures.tokens_per_piece is None
    assert "1 of 1 requests FAILED, 1 of them turned away (429)" in level_text(figures)
    assert "1 x HTTP 429: full" in level_text(figures)
    json.dumps(figures.as_json(), allow_nan=False)


def test_objectives() -> None:
    assert Objectives.parse("ttft:500, tpot:50.5") == Objectives(ttft=500, tpot=50.5)
    assert str(Objectives(ttft=500, e2e=9000)) == "ttft 500 ms, e2e 9000 ms"
    one = record(0.5, 0, 1)
    assert Objectives(ttft=500).kept_by(one)
    assert not Objectives(ttft=499.9).kept_by(one)
    assert Objectives(tpot=1e-3).kept_by(one)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "itl:5",
                                  "ttft:5,ttft:6", "ttft:5,", "ttft=5"])
def test_objectives_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Objectives are given once each"):
        Objectives.parse(text)


# -- the report


def shape(value: Any) -> Any:
    """The form of a JSON value: its keys and types."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


LATENCIES = dict.fromkeys(("mean", "median", "p90", "p95", "p99", "max"), "float")


def test_form_of_the_json() -> None:
    """Programs read this: what changes here raises SCHEMA_VERSION, unless it is one more field."""
    figures = LevelFigures.of(Load(math.inf), [record(0.5, 0.1, 4), RequestRecord(
        50.0, 50.0, [], 51.0, error="HTTP 429", message="full")], Objectives(ttft=500.0))
    written = document("online", "1.0", {"model": "m"}, levels=[figures.as_json()])
    report = json.loads(json.dumps(written, allow_nan=False))
    assert SCHEMA_VERSION == report["schema_version"] == 1
    assert report["levels"][0]["request_rate"] == "inf"
    assert shape(report) == {
        "schema_version": "int", "benchmark": "str", "date": "str", "maxlike": "str", "python": "str", "machine": "str",
        "config": {"model": "str"},
        "levels": [{
            "request_rate": "str", "concurrency": "NoneType", "burstiness": "float", "duration_s": "float",
            "sent": "int", "completed": "int", "failed": "int", "rejected": "int",
            "errors": [{"kind": "str", "count": "int", "example": "str"}],
            "prompt_tokens": "int", "cached_prompt_tokens": "int", "output_tokens": "int", "without_usage": "int",
            "tokens_per_piece": "float", "requests_per_s": "float", "prompt_tokens_per_s": "float",
            "output_tokens_per_s": "float", "goodput_requests_per_s": "float", "good_share": "float",
            "ttft_ms": LATENCIES, "tpot_ms": LATENCIES, "itl_ms": LATENCIES, "e2e_ms": LATENCIES,
            "send_delay_ms": LATENCIES, "client_cpu_share": "float",
        }],
    }
    assert LevelFigures.of(Load(4.0), [record(1, 1, 1)]).as_json()["request_rate"] == 4.0
    assert LevelFigures.of(Load(concurrency=3), [record(1, 1, 1)]).as_json()["concurrency"] == 3


def test_table_of_one_load() -> None:
    block = level_text(LevelFigures.of(Load(2.0), [record(0.5, 0.1, 5, cached_tokens=16)], Objectives(ttft=600)))
    assert block.splitlines() == [
        "2 req/s: 1 of 1 requests in 0.90 s",
        "  requests       1.11/s",
        "  prompt tokens  22.2/s (20, of which 16 came from the prefix cache)",
        "  output tokens  5.6/s (5; 1.00 a piece of text)",
        "  goodput        1.11/s (100.0% of the requests)",
        "  ms                              mean    median       p90       p95       p99       max",
        "  time to first token           500.00    500.00    500.00    500.00    500.00    500.00",
        "  time a token after it         100.00    100.00    100.00    100.00    100.00    100.00",
        "  between pieces of text        100.00    100.00    100.00    100.00    100.00    100.00",
        "  whole request                 900.00    900.00    900.00    900.00    900.00    900.00",
        "  sent late by                    0.00      0.00      0.00      0.00      0.00      0.00",
    ]


def test_what_a_reader_must_know_is_said() -> None:
    late = [record(0.2, 0.1, 3) for _ in range(100)]
    for one in late[:5]:
        one.due -= 0.5
    assert "sent late, 1 in 100 by more than 500 ms" in level_text(LevelFigures.of(Load(2.0), late))
    busy = LevelFigures.of(Load(2.0), [record(0.2, 0.4, 3)], client_cpu_s=0.9)
    assert busy.client_cpu_share == pytest.approx(0.9)
    assert "computed 90% of the time" in level_text(busy)
    uncounted = [record(0.2, 0.1, 3)]
    uncounted[0].has_usage = False
    assert "gave no usage for 1 requests" in level_text(LevelFigures.of(Load(2.0), uncounted))


def test_table_of_several_loads() -> None:
    rows = [line.split() for line in summary_text([level(2.0), failed(4.0)]).splitlines()]
    assert rows[0][:3] == ["load", "ok", "failed"]
    assert rows[1][:5] == ["2", "req/s", "20", "0", f"{level(2.0).requests_per_s:.2f}"]
    assert rows[2] == ["4", "req/s", "0", "1", "0.00", "0.0", "0.0", "-", "-", "-", "-"]
    good = LevelFigures.of(Load(2.0), [record(0.5, 0.1, 5)], Objectives(ttft=600))
    header, row = (line.split() for line in summary_text([good]).splitlines())
    assert (header[-1], row[-1]) == ("goodput/s", "1.11")


def test_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": 1}, str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
    write_json({"b": 2}, "-")
    assert json.loads(capsys.readouterr().out) == {"b": 2}
    with pytest.raises(ValueError, match="cannot be written to"):
        write_json({}, str(tmp_path))
    with pytest.raises(ValueError, match=r"Nothing can be written to .*: that is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        check_writable(tmp_path / "none" / "report.json")
    check_writable("report.json")


# -- the picture


@pytest.fixture
def three_loads() -> list[LevelFigures]:
    return [level(4.0, 2.0), level(1.0), level(math.inf, 5.0)]  # not in order


def test_png(tmp_path: Path, three_loads: list[LevelFigures]) -> None:
    import matplotlib.image

    file = tmp_path / "load.png"
    plot(three_loads, file, "a model")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(file)[..., :3]
    height, width = pixels.shape[:2]
    assert (height, width) == (1050, 1500)
    # Each of the four panels has both lines: pixels of their two colours.
    for panel in (pixels[:height // 2, :width // 2], pixels[:height // 2, width // 2:],
                  pixels[height // 2:, :width // 2], pixels[height // 2:, width // 2:]):
        for color in ((31, 119, 180), (255, 127, 14)):
            assert (np.abs(panel * 255 - color).max(-1) < 2).sum() > 200


def test_svg_has_the_points_where_they_belong(tmp_path: Path, three_loads: list[LevelFigures]) -> None:
    import matplotlib

    file = tmp_path / "load.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot(three_loads, file, "a model")
    root = xml.etree.ElementTree.parse(file).getroot()
    texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a model", "requests a second", "output tokens a second", "time to first token, ms", "time a token, ms",
            "median", "99th percentile", "1", "4", "all at once"} <= texts


def test_lines_go_by_load(three_loads: list[LevelFigures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    plot([*three_loads, failed(2.0)], tmp_path / "load.pdf", "")
    against_load, against_throughput = figures[0].axes[:2]
    four, one, unbound = three_loads
    for level_, x in ((one, 1.0), (four, 4.0), (unbound, 4.8)):
        assert level_.ttft_ms is not None
        i = [1.0, 4.0, 4.8].index(x)
        medians, tails = against_load.lines
        assert (medians.get_xdata()[i], medians.get_ydata()[i]) == pytest.approx((x, level_.ttft_ms.median))
        assert tails.get_ydata()[i] == level_.ttft_ms.p99
        assert against_throughput.lines[0].get_xdata()[i] == level_.output_tokens_per_s
    assert len(against_load.lines[0].get_xdata()) == 3  # the load of which nothing succeeded has no point


def test_plots_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg, \.pdf; got .*load\.gif"):
        check_plot(tmp_path / "load.gif")
    with pytest.raises(ValueError, match="cannot be written"):
        plot([level(1.0)], tmp_path / "none" / "load.png", "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'maxlike\[bench\]'"):
        check_plot(tmp_path / "load.png")
