"""Rule rewards, checkers of answers and R1-Zero's template: what counts, by hand, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from rl4llm_fast.trainer.checkers import choice_of, jsonl_task, number_of, same_choice, same_number, same_text
from rl4llm_fast.trainer.rewards import (
    Rewards,
    Sample,
    answer_of,
    format_rule,
    language_rule,
    language_share,
    length_rule,
    make_rewards,
    of_function,
    parts,
    r1_zero_prompt,
    r1_zero_task,
    repetition_rule,
    summary_of,
    tags_rule,
    thought_of,
)
from rl4llm_fast.trainer.tasks import Task, load_task

GOOD = "<think> 4 and 3 make 7. </think><answer> 7 </answer>"


def said(text: str, **changes) -> Sample:
    return Sample("a question", text, **changes)


@pytest.mark.parametrize(
    ("text", "form", "tags"),
    [
        (GOOD, 1, 1),
        (f"\n{GOOD.replace('><', '>' + chr(10) + '<')} ", 1, 1),
        (f"Sure. {GOOD}", 0, 1),  # something in front
        (f"{GOOD} Bye.", 0, 1),
        (GOOD + GOOD, 0, 0),  # twice
        ("<answer>7</answer><think>4 + 3</think>", 0, 1),  # the wrong order
        ("<think></think><answer>7</answer>", 0, 1),  # no thought
        ("<think>4 + 3</think><answer> </answer>", 0, 1),
        ("<think>4 + 3</think>7", 0, 0.5),
        ("<think>a<think></think><answer>7</answer>", 0, 0.75),
        ("7", 0, 0),
        ("", 0, 0),
    ],
)
def test_format_and_tags(text, form, tags):
    assert format_rule(said(text)) == form
    assert tags_rule(said(text)) == tags


def test_parts_of_an_answer():
    assert parts(GOOD) == (" 4 and 3 make 7. ", " 7 ")
    assert parts("<think>7</think>") is None
    assert (thought_of(GOOD), answer_of(GOOD), summary_of(GOOD)) == ("4 and 3 make 7.", "7", "7")
    assert thought_of("<think> never closed") == ""
    assert answer_of("<answer>6</answer><answer>7</answer>") == ""  # guesses do not count
    assert summary_of("No thought at all.") == "No thought at all."


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("so it is seven", "en", 1),
        ("so it is 七", "en", 3 / 4),
        ("我们 have two", "en", 2 / 4),  # each Chinese letter is a word
        ("我们 have two", "zh", 2 / 4),
        ("это seven", "ru", 1 / 2),
        ("naïve café", "en", 1),
        ("mix你en", "en", 2 / 3),  # a change of script ends a word
        ("4 + 3 = 7", "en", 1),  # no words, nothing mixed
        ("これは本です", "ja", 1),
    ],
)
def test_language_share(text, language, share):
    assert language_share(text, language) == pytest.approx(share)
    assert language_rule(said(f"<think>{text}</think>这不算<answer>7</answer>"), language=language) == pytest.approx(
        share
    )


def test_language_needs_a_thought():
    assert language_rule(said("plain English")) == 0
    assert language_rule(said("<think></think>plain English")) == 0


def test_length_and_repetition_by_hand():
    values = [length_rule(said("", tokens=n), limit=100, buffer=20) for n in (0, 80, 85, 90, 100, 200)]
    assert values == [0, 0, -0.25, -0.5, -1, -1]
    assert repetition_rule(said("a b c d a b c d a b c d")) == pytest.approx(-(1 - 4 / 9))
    assert repetition_rule(said("one two three")) == 0
    assert repetition_rule(said("a a a"), words=1) == pytest.approx(-2 / 3)


def test_the_sum_and_its_trace():
    rewards = make_rewards(
        {"accuracy": 1.0, "format": 0.5, "length": 0.1, "ended": 2}, {"length_limit": 10, "length_buffer": 10},
        lambda example, completion: float(answer_of(completion) == "7"), max_new_tokens=64,
    )  # fmt: skip
    total, trace = rewards.score(said(GOOD, tokens=5, ended=False))
    assert trace == {"accuracy": 1, "format": 1, "length": -0.5, "ended": 0}
    assert total == pytest.approx(1 + 0.5 - 0.05)


def word_count(example, completion):
    return len(completion.split())


def test_functions_of_ones_own_by_name():
    rewards = make_rewards(
        {f"{__name__}.word_count": 0.5, f"{__name__}:word_count": 0.25}, {}, word_count, max_new_tokens=4
    )
    assert rewards.score(said("two words"))[0] == 1.5


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"fromat": 1.0}, {}, "'fromat'; the nearest is 'format'"),
        ({"format": "much"}, {}, "rewards.format: wanted a number, its weight, got 'much'"),
        ({"format": math.nan}, {}, "rewards.format"),
        ({"nowhere.at_all": 1.0}, {}, "no function 'nowhere.at_all'"),
        ({"json.no_such": 1.0}, {}, "no_such"),
        ({"math.pi": 1.0}, {}, "wanted a function, 'math.pi' is float"),
        ({"format": 1.0}, {"langauge": "en"}, "'langauge'; the nearest is 'language'"),
        ({"format": 1.0}, {"language": "klingon"}, "'klingon'"),
        ({"length": 1.0}, {"length_limit": 0}, "length_limit: wanted an integer of at least 1"),
        ({"length": 1.0}, {"length_limit": 4, "length_buffer": 8}, "length_buffer: wanted at most"),
    ],
)
def test_refused_settings(weights, options, message):
    with pytest.raises(ValueError, match="(?s).*" + message):
        make_rewards(weights, options, word_count, max_new_tokens=8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a finite number, got nan"),
        (math.inf, "a finite number, got inf"),
        ([1, 2], r"one number, got \[1, 2\]"),
        (None, "one number, got None"),
    ],
)
def test_a_bad_value_names_the_function_and_the_sample(value, message):
    def my_reward(example, completion):
        return value

    with pytest.raises(ValueError, match=f"'my_reward': wanted {message} for the answer 'seven' to 'a question'"):
        of_function(my_reward).score(said("seven"))
    with pytest.raises(TypeError, match="need a tokenizer"):
        Rewards({"format": (1.0, format_rule)}).score(Sample([1, 2], [3, 4]))


# Checkers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 7.", 7),
        ("4 - 3 = 1", 1),
        ("it is -12", -12),
        ("10-4", 4),  # a difference, not a negative number
        ("1,234", 1234),
        ("1,2,3", 3),
        ("costs $3.50.", 3.5),
        ("about 50%", 0.5),
        ("3/4 of it", 0.75),
        ("\N{MINUS SIGN}5", -5),
        (".5", 0.5),
    ],
)
def test_numbers(text, value):
    assert number_of(text) == value


def test_checkers():
    assert same_number("So 1/2.", "0.50")
    assert same_number("50 %", "0.5")
    assert not same_number("7 or 8", "7")
    assert not same_number("none", "7")
    assert number_of("7/0") is None
    assert number_of("9" * 10_000) is None  # longer than Python converts: an answer like any other wrong one
    assert number_of("10**10**10") == 10  # read, not computed
    texts = ("B", "b.", "(C)", "The answer is (D).", "Answer: **A**", "A or B? I say option C")
    assert [choice_of(text) for text in texts] == ["B", "B", "C", "D", "A", "C"]
    assert choice_of("A train leaves.") is None
    assert choice_of("the answer is a train") is None
    assert same_choice("(A), no: (B)", "B")
    assert not same_choice("nothing", "B")
    assert same_text("  The Blue whale. ", "the blue Whale")
    assert not same_text("the whale", "the blue whale")


def test_questions_of_ones_own(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{a} + 1?", "answer": a + 1} for a in range(-1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    task = load_task(str(path), heldout=3)
    held, train = ({e["prompt"] for e in part} for part in (task.heldout, task.train))
    assert (len(held), len(train), held & train) == (3, 7, set())
    example = next(e for e in [*task.train, *task.heldout] if e["answer"] == "5")
    assert task.reward(example, "that is 5.0") == 1  # all answers are numbers, 0 among them
    assert task.reward(example, "that is 6") == 0
    assert jsonl_task(str(path), heldout=1, checker="text").reward(example, "5.0") == 0
    with pytest.raises(ValueError, match="too few to hold 10"):
        load_task(str(path), heldout=10)
    with pytest.raises(ValueError, match="checker: wanted auto, number"):
        load_task(str(path), checker="eval")
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="line 1: wanted"):
        load_task(str(path))


def made_task(seed, heldout, size=4):
    return Task(train=[f"question {i}" for i in range(size)], reward=word_count)


def no_task(seed, heldout):
    return None


def test_a_task_of_ones_own():
    assert len(load_task(f"{__name__}:made_task", size=6).train) == 6
    with pytest.raises(ValueError, match="returns a Task"):
        load_task(f"{__name__}:no_task")


# The template


def test_the_template_is_table_1():
    text = r1_zero_prompt("What is 4 + 3?")
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant")
    assert text.endswith("User: What is 4 + 3? Assistant:")
    assert "<think> reasoning process here </think><answer> answer here </answer>" in text
    assert r1_zero_prompt("Add 4 and 3 ").endswith("User: Add 4 and 3. Assistant:")
    shown = r1_zero_prompt("Add 4 and 3", "User: Hi. Assistant: Yes.")
    assert shown.endswith("answer here </answer>.\nUser: Hi. Assistant: Yes.\nUser: Add 4 and 3. Assistant:")


def test_a_task_in_the_template():
    def reward(example, completion):
        seen.append(example)
        return float(completion == example["wanted"])

    def tokenizer(text):
        return {"input_ids": [ord(letter) for letter in text]}

    seen: list = []
    example = {"prompt": "4 + 3?", "wanted": "7"}
    task = r1_zero_task(Task(train=[example], reward=reward, heldout=[example]), tokenizer)
    framed = task.train[0]
    assert "".join(map(chr, framed["prompt"])) == r1_zero_prompt("4 + 3?")
    assert (framed["question"], framed["wanted"]) == ("4 + 3?", "7")
    assert [task.reward(framed, text) for text in (GOOD, "7", "<answer>7</answer><answer>8</answer>")] == [1, 0, 0]
    assert seen == [example] * 3  # the reward's author knows nothing of templates
    with pytest.raises(TypeError, match="prompts that are text"):
        r1_zero_task(Task(train=[[1, 2]], reward=reward), tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        r1_zero_task(Task(train=["4 + 3?"], reward=reward), None)
