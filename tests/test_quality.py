"""`bench.quality`: its table, and what an interrupted call leaves to do, without a model."""

import pathlib

from bench import quality, quality_bits, quality_rounding

SETTING = {"training_tokens": 61440}


def result(method, seed, rows):
    return {"method": method, "seed": seed, "setting": SETTING, "rows": rows}


def test_the_table_has_the_median_and_the_range_of_the_seeds():
    found = [
        result("nested", seed, [{"size_ratio": 0.8, "wikipedia": value}, {"size_ratio": 0.4, "wikipedia": 2000.0}])
        for seed, value in enumerate((17.0, 19.0, 18.0))
    ]
    # Evaluated on another text alone: no row here.
    found.append(result("svd", 0, [{"size_ratio": 0.8, "news": 9.0}]))
    lines = quality.table(found).splitlines()
    assert lines[0] == "| method | tokens trained | seeds | 0.8 | 0.4 |"
    assert lines[2:] == ["| nested | 61 k | 3 | 18.0 (17.0–19.0) | 2,000 (2,000–2,000) |"]
    assert quality.table(found, "news").splitlines()[2:] == ["| svd | 61 k | 1 | 9.0 |"]


def test_recipes_are_compared_by_their_seeds():
    earlier = [{"about": "before", "runs": [{"wikipedia": {"0.8": 20.0}}, {"wikipedia": {"0.8": 21.0, "0.4": 50.0}}]}]
    now = [result("nested", 0, [{"size_ratio": 0.8, "wikipedia": 19.0}]), result("svd", 0, [{"size_ratio": 0.8}])]
    lines = quality.recipes_table(earlier, now).splitlines()
    assert lines[0] == "| recipe | seeds | 0.8 | 0.4 |"
    assert lines[2] == "| before | 2 | 21.00 (20.00–21.00) | 50.00 |"
    assert lines[3].endswith("| 1 | 19.00 | – |")


def test_every_method_has_a_configuration_that_says_so():
    assert quality.AFTERWARDS.keys() < quality.METHODS.keys()
    for method, make in quality.METHODS.items():
        config = make(seed=3, steps=40).to_dict()
        if "steps" in config:
            assert config["steps"] == 40 and config["seed"] == 3, method
        assert config["forms"] == quality.FACTORS or "pivoted" in config["forms"], method


def test_results_are_read_in_order(tmp_path: pathlib.Path):
    for name in ("svd-0", "nested-1", "nested-0"):
        (tmp_path / f"{name}.json").write_text(f'{{"method": "{name}"}}')
    assert [one["method"] for one in quality.read_results(tmp_path)] == ["nested-0", "nested-1", "svd-0"]


def test_the_frontier_is_what_no_other_model_beats_in_bytes_and_perplexity():
    def row(size, weights, file_bytes, perplexity):
        return {
            "method": "nested",
            "size_ratio": size,
            "weights": weights,
            "file_bytes": file_bytes,
            "perplexity": perplexity,
        }

    rows = [row(1.0, "bfloat16", 200e6, 16.0), row(1.0, "int4", 90e6, 18.0), row(0.5, "bfloat16", 110e6, 30.0)]
    rows.append(row(0.5, "int4", 80e6, 33.0))
    assert quality_bits.frontier(rows) == [rows[3], rows[1], rows[0]]
    lines = quality_bits.table({"rows": rows}).splitlines()
    assert "**18.0 (90 MB)**" in lines[2] and "  30.0 (110 MB) |" in lines[3] and "–" in lines[2]


def test_what_rounding_was_told_is_a_row():
    rows = [{"told": "nothing", "wide": 0.1163, "all": 0.2387}, {"told": "the factors", "wide": 0.05, "all": 0.1}]
    lines = quality_rounding.table({"rows": rows}).splitlines()
    assert len(lines) == 4 and "0.116" in lines[2] and "0.100" in lines[3]
