"""Parsers and formulas of the benchmarks against what the release returned."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat import Unusable
from evals import answers
from evals.files import strip_thinking
from evals.memorise import common_prefix, common_span

GOLDEN = json.loads((Path(__file__).parent / "golden_evals.json").read_text("utf-8"))
EQBENCH = GOLDEN["eqbench"]
ON_PURPOSE = {  # kind -> what ours does with it; "fails", or "reads" all criteria
    "longform": {
        "negative number ignored": "fails",
        "only one": "fails",
        "bullets": "reads",
        "bold colon inside": "reads",
        "--- inside the block cuts it": "reads",
    }
}
ON_PURPOSE["creative"] = {**ON_PURPOSE["longform"], "Score: prefix line": "reads"}
WEIGHTS = {"forced poetry or metaphor": 5.0}


def outcome(parse, *arguments):
    """What a parser returns; None for a failure."""
    try:
        return parse(*arguments)
    except Unusable:
        return None


def text_of(output) -> str:
    return output if isinstance(output, str) else json.dumps(output) if output else ""


def raw_key(name: str) -> str:
    return "raw_" + name.lower().replace("'", "").replace("-", "_").replace(" ", "_").replace(
        "/", "_"
    )


@pytest.mark.parametrize("task", ["longform", "creative"])
def test_score_lines_equal_the_release_but_for_the_kinds_that_depart_on_purpose(task):
    golden = EQBENCH[f"eq_bench_{task}"]
    criteria, negative = golden["dims"], golden["negative"]
    equal = 0
    for case in golden["cases"]:
        found = outcome(answers.parse_scores, case["judge_text"], criteria)
        if does := ON_PURPOSE[task].get(case["kind"]):
            assert (found is None) if does == "fails" else len(found) == len(criteria), case["kind"]
            continue
        equal += 1
        record = case["record"]
        raws = {name: record[raw_key(name)] for name in criteria}
        raws = {name: x for name, x in raws.items() if x is not None}
        assert (found or {}) == raws, case["kind"]
        if task == "longform":
            score = answers.longform_score(found, negative, WEIGHTS) if found else None
            printed = record["weighted_score"]
        else:
            score = answers.creative_score(found, negative) if found else None
            printed = record["eqbench_creative_score"]
        assert (score and round(score, 2)) == printed, case["kind"]
    assert equal == {"longform": 19, "creative": 18}[task]


def test_formulas_equal_the_release_on_cases_whose_answers_ours_refuses():
    """The raw scores that the release read, through our formulas: all cases but the empty ones."""
    for task in ("longform", "creative"):
        golden = EQBENCH[f"eq_bench_{task}"]
        for case in golden["cases"]:
            record = case["record"]
            raws = {n: record[raw_key(n)] for n in golden["dims"]}
            raws = {name: x for name, x in raws.items() if x is not None}
            if raws and task == "longform":
                score = answers.longform_score(raws, golden["negative"], WEIGHTS)
                assert round(score, 2) == record["weighted_score"]
            elif raws:
                score = answers.creative_score(raws, golden["negative"])
                assert round(score, 2) == record["eqbench_creative_score"]


def test_forced_poetry_and_the_uniform_score():
    name = "Forced Poetry or Metaphor"
    for case in EQBENCH["forced_poetry_adjust"]:
        ours = answers.adjusted(name, case["raw"], [name], 1.7)
        assert ours == pytest.approx(case["adjusted"], abs=1e-12)
    scores = {"Coherent": 12.0, name: 5.0}
    assert answers.longform_score(scores, [name], {}, 1.0) == 5 * (12 + 15) / 2


CRITERIA = EQBENCH["eq_bench_creative"]["dims"]


def test_forms_of_a_score_line():
    lines = [f"{name}: 10" for name in CRITERIA]

    def read(line: str, name: str = "Coherent") -> float | None:
        others = [other for other in lines if not other.startswith(f"{name}:")]
        return answers.parse_scores("\n".join([*others, line]), CRITERIA).get(name)

    for line in (
        "Coherent: 7",
        "**Coherent**: 7",
        "**Coherent:** 7",
        "- Coherent: [7]",
        "3. Coherent: 7/20",
        "* **Coherent** : Score: 7",
        "Coherent: **7** - it holds",
        "coherent: 7 (mostly)",
        "## Coherent: 7.0",
        "Coherent: 7, with a lapse",
    ):
        assert read(line) == 7, line
    assert read("Coherent: 25") == 20
    for line in ("Coherent: N/A", "Coherent: -3", "Coherent: 10–12", "Coherent: 10 - 12", ""):
        assert read(line) is None, line
    assert read("Coherent: 3/10") is None
    assert read("Tell-Don’t-Show: 4", "Tell-Don't-Show") == 4
    name = "Consistent Voice/Tone of Writing"
    assert read("Consistent Voice / Tone of Writing: 4", name) == 4
    assert read("Consistent Voice: 4", name) == 4  # a prefix that fits one
    # ten letters of two criteria: the score of neither
    assert read("Emotionally: 4", "Emotionally Complex") is None
    assert read("Emotionally Engaging: 4", "Emotionally Complex") is None
    text = "Coherent: 1\n[Scores]\nCoherent: 2\n[Scores]\n" + "\n".join(lines)
    assert answers.parse_scores(text, CRITERIA)["Coherent"] == 10


def test_three_in_four_criteria_must_be_rated():
    for n, needed in ((12, 9), (22, 17), (16, 12)):
        names = [f"criterion number {i:02}" for i in range(n)]
        rated = "\n".join(f"{name}: 5" for name in names[:needed])
        assert len(answers.parse_scores(rated, names)) == needed
        with pytest.raises(Unusable, match="criteria missing"):
            answers.parse_scores("\n".join(rated.splitlines()[1:]), names)


def test_longbench_equals_the_release_but_for_the_kinds_that_depart_on_purpose():
    equal = 0
    for case in GOLDEN["longbench"]["cases"]:
        found = outcome(answers.parse_longbench, text_of(case["judge_output"]))
        record = case["record"] or {"dim_scores": {}, "quality_score_sq": None}
        if case["kind"] in ("text before",):
            assert found and len(found) == 6
        elif case["kind"] in ("missing dim", "string score ignored", "bool counts as 1"):
            assert found is None
        else:
            equal += 1
            assert (found or {}) == record["dim_scores"], case["kind"]
            sq = answers.longbench_quality(found) if found else None
            assert sq == record["quality_score_sq"]
        if case["word_count"] and (case["target_length"] or 0) > 0 and case["record"]:
            sl = answers.longbench_length(case["word_count"], case["target_length"])
            assert sl == pytest.approx(record["length_score_sl"], abs=1e-12)
            if found and record["combined_score"] is not None:
                combined = answers.longbench_quality(found) * sl / 100
                assert round(combined, 2) == record["combined_score"]
    assert equal == 21


def test_writingbench_equals_the_release_but_for_the_kinds_that_depart_on_purpose():
    equal = 0
    for case in GOLDEN["writingbench"]["cases"]:
        found = outcome(answers.parse_writingbench, text_of(case["judge_output"]))
        if case["kind"] == "text after":
            assert found == {"score": 7}
        elif case["kind"] == "bool true -> 1":
            assert found is None
        else:
            equal += 1
            assert (found or {"score": None})["score"] == case["record"]["score"], case["kind"]
    assert equal == 22


def test_pairwise_equals_the_release_but_for_the_kinds_that_depart_on_purpose():
    for case in GOLDEN["pairwise"]["verdicts"]:
        assert answers.verdict_score(case["diff"]) == case["score_a"]
    few = ("tie by sum", "diff +10", "diff -10", "six plus", "empty -> tie")
    equal = 0
    for case in GOLDEN["pairwise"]["cases"]:
        found = outcome(answers.parse_pairwise, text_of(case["judge_output"]))
        if case["kind"] == "text after -> tie":
            assert found == {"first": 22, "second": 6}
        elif case["kind"] in few:
            assert found is None
        else:
            equal += 1
            record = case["record"]
            plusses = {"first": record["plus_a"], "second": record["plus_b"]}
            assert found == plusses, case["kind"]
    assert equal == 24


def test_the_two_writers_of_the_official_prompt_are_told_apart():
    keys = answers.PAIRWISE_KEYS
    for mark, expected in (("A0493", (45, 0)), ("A0488", (0, 45))):
        text = json.dumps({key: mark + "++++++" for key in keys})  # six count as five
        found = answers.parse_pairwise(text, ("A0493", "A0488"))
        assert (found["first"], found["second"]) == expected
        with pytest.raises(Unusable):
            answers.parse_pairwise(text)  # neither is "A"


def test_the_last_complete_object_counts_and_no_array():
    assert answers.last_object('{"a": 1} then {"b": {"c": 2}} and {"d":') == {"b": {"c": 2}}
    for text in ("[1, 2]", '[{"score": 7}]', "", "prose {x}", '{"score": NaN}', "{" * 5000):
        with pytest.raises(Unusable):
            answers.last_object(text)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text('{}[]"\\:,0123456789-+ABscore\n ', max_size=120))
def test_parsers_fail_in_one_way_only(text):
    for parse in (answers.parse_longbench, answers.parse_writingbench, answers.parse_pairwise):
        outcome(parse, text)
    outcome(answers.parse_scores, text, CRITERIA)


def test_test_composite_of_the_golden_totals():
    totals = json.loads((Path(__file__).parent / "golden_story_quality.json").read_text("utf-8"))
    for case in totals["totals"]:
        points = [case[f"{name}_total"] for name in ("positive", "negative", "bonus")]
        ours = answers.test_composite(*points)
        assert ours == min(100, points[0] - points[1] + points[2])


# ------------------------------------------------------------------------------------------- audit


def test_spans_equal_the_release():
    for case in GOLDEN["audit"]["cases"]:
        assert common_prefix(case["a"], case["b"]) == case["exact_prefix"]
        span = (case["lcs_size"], case["lcs_a"], case["lcs_b"])
        assert common_span(case["a"], case["b"]) == span, case["kind"]


def test_thinking_is_removed_as_in_the_release_and_where_the_template_opened_it():
    for case in GOLDEN["audit"]["extract_story"]:
        if case["text"].startswith("no open tag"):  # the release compares thinking with the story
            assert strip_thinking(case["text"]) == "Story"
        else:
            assert strip_thinking(case["text"]) == case["story"]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_the_common_span_is_its_definition(a, b):
    spans = [
        (n, i, j)
        for n in range(1, min(len(a), len(b)) + 1)
        for i in range(len(a) - n + 1)
        for j in range(len(b) - n + 1)
        if a[i : i + n] == b[j : j + n]
    ]
    longest = max((n for n, _, _ in spans), default=0)
    first = min(((i, j) for n, i, j in spans if n == longest), default=(0, 0))
    assert common_span(a, b) == (longest, *first)
    assert fmean([longest]) >= common_prefix(a, b)
