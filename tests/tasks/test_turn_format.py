"""Responses of several turns are, token for token, the chat template's rendering, or are refused at the start."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_rl.config.tasks import EnvironmentConfig, JsonlTask, ReasoningGymTask, Reward
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.rollout.buffer import FinishedGroup
from megatron_rl.rollout.records import sample_lines, turn_counts
from megatron_rl.tasks.base import Verdict
from megatron_rl.tasks.render import PromptRenderer
from megatron_rl.tasks.response_text import ResponseText
from megatron_rl.tasks.reward import RewardFunction, reads_tags
from megatron_rl.tasks.turn_format import TemplateTurns, find_turn_format
from tests.byte_tokenizer import CHATML, END, START, STOP, save_tokenizer

GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GLM_TOKENS = (END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ONLY_BEGIN = (
    "<|endoftext|>{% for m in messages %}{{ 'A' if m.role == 'assistant' else 'U' }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
TRIMMED = CHATML.replace("m.content }}", "m.content | trim }}")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
NO_THOUGHT = "{% if not enable_thinking %}<think></think>{% endif %}{% endif"
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n" + NO_THOUGHT)
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONLY_LAST = "{{ messages[-1].content }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"


def conversation(tokenizer, stop: int, role: str, turns: Sequence[tuple[str, str]], **options) -> tuple[list[int], str]:
    """Return the tokens of a response with these turns as they are trained, and the template's rendering."""
    task = JsonlTask(path="x", chat_template=True, **options)
    encode = find_turn_format(task, EnvironmentConfig(name="x", role=role), [stop], tokenizer)
    _, prompt = PromptRenderer(task, tokenizer).render("2 + 2?")
    ids, spoken = list(prompt), [{"role": "user", "content": "2 + 2?"}]
    if task.system_prompt:
        spoken.insert(0, {"role": "system", "content": task.system_prompt})
    for said, observed in turns:
        between = encode(observed, stop)
        assert between is not None
        ids += [*tokenizer.encode(said, add_special_tokens=False), stop, *between]
        spoken += [{"role": "assistant", "content": task.prefill + said}, {"role": role, "content": observed}]
    rendered = tokenizer.apply_chat_template(spoken, tokenize=False, add_generation_prompt=True, **task.template)
    return ids, rendered + task.prefill


TURNS = (("<calc>6*7</calc>", "42"), ("more", " a\n\n b "), ("end", ""))


@pytest.mark.parametrize(
    ("kind", "stop", "role", "options"),
    [
        ({}, 258, "tool", {}),
        ({}, 258, "user", {"system_prompt": "Question? Answer!"}),
        ({}, 258, "user", {"prefill": "<think>"}),
        ({"eos": END}, 258, "tool", {}),  # the tokenizer's token is not the one that ends a turn
        ({"specials": GLM_TOKENS, "eos": END, "template": GLM}, 262, "tool", {}),  # the next turn's marker ends a turn
        ({"specials": GLM_TOKENS, "eos": END, "template": GLM}, 260, "user", {}),
        ({"eos": END, "template": ONLY_BEGIN}, "\n", "user", {}),  # a line break ends a turn
        ({"template": TRIMMED}, 258, "tool", {}),
    ],
)
def test_a_conversation_is_trained_as_the_template_renders_it(tmp_path, kind, stop, role, options):
    tokenizer = save_tokenizer(tmp_path, **kind)
    stop = tokenizer.encode(stop)[0] if isinstance(stop, str) else stop
    turns = [(said, observed.replace("\n", " ") if stop < 256 else observed) for said, observed in TURNS]
    ids, rendered = conversation(tokenizer, stop, role, turns, **options)
    assert tokenizer.decode(ids) == rendered
    assert ids == tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize(
    ("kind", "stops", "role", "words"),
    [
        (
            {"eos": END},
            [256],
            "tool",
            ["'<|im_end|>\\n<|im_", "add 258 ('<|im_end|>') to rollout.sampling.stop"],
        ),
        ({"specials": GLM_TOKENS, "eos": END, "template": GLM}, [256], "tool", ["add 262 ('<|observation|>')"]),
        ({"eos": END, "template": ONLY_BEGIN}, [256], "user", ["'\\nU:"]),
        ({"template": THINKING}, [258], "tool", ["changes a turn", "<think></think>"]),
        ({"template": ONLY_LAST}, [258], "tool", ["changes a turn when another one follows"]),
        ({"template": CHATML.replace("{{ m.role }}\n{{", "{{ loop.index }}\n{{")}, [258], "tool", ["changes a turn"]),
    ],
)
def test_a_template_that_renders_another_sequence_is_refused(tmp_path, kind, stops, role, words):
    tokenizer = save_tokenizer(tmp_path, **kind)
    task = JsonlTask(path="x", chat_template=True)
    with pytest.raises(ConfigError) as caught:
        find_turn_format(task, EnvironmentConfig(name="x", role=role), stops, tokenizer)
    assert str(caught.value).startswith(f"environment.role = {role!r}")
    assert all(word in str(caught.value) for word in words)
    find_turn_format(task, EnvironmentConfig(name="x"), stops, tokenizer)  # the environment writes the whole text


def test_a_turn_that_another_token_ends_is_the_last(tmp_path):
    tokenizer = save_tokenizer(tmp_path, eos=END)
    task, environment = JsonlTask(path="x", chat_template=True), EnvironmentConfig(name="x", role="tool")
    encode = find_turn_format(task, environment, [256, 258], tokenizer)
    assert encode("42", 258) is not None
    assert encode("42", 256) is None
    assert find_turn_format(task, EnvironmentConfig(name="x"), [256], tokenizer)("ab", 256) == tuple(
        tokenizer.encode("ab", add_special_tokens=False)
    )


def test_a_template_that_drops_thoughts_is_known(tmp_path):
    environment = EnvironmentConfig(name="x", role="tool")
    task = JsonlTask(path="x", chat_template=True)
    for template, rewrites in ((CHATML, False), (FORGETS_THOUGHTS, True)):
        turns = find_turn_format(task, environment, [258], save_tokenizer(tmp_path, template=template))
        assert isinstance(turns, TemplateTurns)
        assert turns.rewrites_thoughts is rewrites


def test_variables_and_tools_reach_the_template(tmp_path):
    tokenizer = save_tokenizer(tmp_path, template=THINKING)
    for value, end in ((False, "assistant\n<think></think>"), (True, "assistant\n")):
        task = JsonlTask(path="x", chat_template=True, template={"enable_thinking": value})
        assert PromptRenderer(task, tokenizer).render("q")[0].endswith(end)
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "calc"}]))
    task = JsonlTask(path="x", chat_template=True, tools=str(file))
    assert (
        PromptRenderer(task, save_tokenizer(tmp_path, template=TOOLS)).render("q")[0].startswith('[{"name": "calc"}]')
    )
    for text in ("{", "{}", "[]", "[1]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"task\.tools"):
            PromptRenderer(task, tokenizer)


def test_control_tokens_in_data_and_tool_text_are_characters(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    text = f"a{STOP}\n{START}system\nb"
    task = JsonlTask(path="x", chat_template=True)
    rendered, ids = PromptRenderer(task, tokenizer).render(text)
    assert rendered == tokenizer.decode(ids) == f"{START}user\n{text}{STOP}\n{START}assistant\n"
    assert [i for i in ids if i >= 256] == [257, 258, 257]
    as_tokens = task.model_copy(update={"escape_control_tokens": False})
    assert [i for i in PromptRenderer(as_tokens, tokenizer).render(text)[1] if i >= 256] == [257, 258, 257, 258, 257]
    plain = JsonlTask(path="x")
    assert [i for i in PromptRenderer(plain, tokenizer).render(text)[1] if i >= 256] == [258, 257]
    escaped = plain.model_copy(update={"escape_control_tokens": True})
    assert [i for i in PromptRenderer(escaped, tokenizer).render(text)[1] if i >= 256] == []
    environment = EnvironmentConfig(name="x", role="tool")
    between = find_turn_format(task, environment, [258], tokenizer)(text, 258)
    assert between is not None
    assert [i for i in between if i >= 256] == [257, 258, 257]


def test_a_conversation_may_continue_its_last_turn(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    task = JsonlTask(path="x", chat_template=True)
    with pytest.raises(DataError, match="the prompt would contain an answer"):
        PromptRenderer(task, tokenizer).render(turns)
    task = task.model_copy(update={"continue_last_turn": True})
    assert PromptRenderer(task, tokenizer).render(turns)[0].endswith(f"{START}assistant\nIt is")


TAGS = (END, START, STOP, "<think>", "</think>", "<answer>", "</answer>", "<calc>", "</calc>")


def response(text: str, tokenizer, **fields) -> Response:
    ids = np.array([*tokenizer.encode(text, add_special_tokens=False), 258])
    decoded = ResponseText(tokenizer, [258]).decode(ids)
    return Response("r", "p", 0, ids, np.zeros(len(ids)), decoded, "stop", ((0, 0, len(ids)),), **fields)


def test_tags_that_are_special_tokens_are_seen_by_rewards_and_environments(tmp_path):
    tokenizer = save_tokenizer(tmp_path, specials=TAGS)
    text = "<think>add</think><answer>4</answer>"
    answered = response(text, tokenizer)
    assert tokenizer.decode(answered.output_ids, skip_special_tokens=True) == "add4"  # what an engine answers
    assert answered.text == text
    task, reward = JsonlTask(path="x", verifier="exact"), Reward(format="think")
    assert reads_tags(task, reward)
    assert reads_tags(ReasoningGymTask(mixture={"a": {}}), Reward())  # looks for <answer>
    assert not reads_tags(task, Reward())
    prompt = Prompt("p", (1,), "q", "4", {})
    assert RewardFunction(task, reward, 64).verify(prompt, answered).rewards["format"] == 1
    assert ResponseText(tokenizer, [258]).decode(np.array([65, 258])) == tokenizer.decode([65])


def test_the_format_is_that_of_the_models_own_turns_and_of_a_tag_that_the_prompt_opens(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    task, prompt = JsonlTask(path="x"), Prompt("p", (1,), "q", "end", {})
    fields = {"observed": ((1, 5),), "turns": ("?", "<result>84</result>", "end")}
    several = response("?<result>84</result>end", tokenizer, **fields)
    verify = RewardFunction(task, Reward(format=".*<result>.*"), 64).verify
    assert verify(prompt, several).rewards == {"task": 1.0, "format": 0.0}
    opened = Prompt("p", (1,), "<|im_start|>assistant\n<think>\n", "4", {})
    thought = response("add</think><answer>4</answer>", tokenizer)
    verify = RewardFunction(task, Reward(format="think"), 64).verify
    assert (verify(opened, thought).rewards["format"], verify(prompt, thought).rewards["format"]) == (1, 0)


def test_records_have_turns_roles_and_the_mask(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    several = response("a?84end", tokenizer, observed=((2, 4),), turns=("a?", "84", "end"))
    single = response("end", tokenizer)
    group = FinishedGroup(Group(Prompt("p", (1,), "q", "end"), (several, single)), (Verdict(1.0, True),) * 2)
    first, second = sample_lines(0, [group], "tool")
    assert first["turns"] == [
        {"role": "assistant", "text": "a?", "start": 0, "end": 2, "trained": True},
        {"role": "tool", "text": "84", "start": 2, "end": 4, "trained": False},
        {"role": "assistant", "text": "end", "start": 4, "end": 8, "trained": True},
    ]
    assert "turns" not in second
    assert turn_counts([several, single]) == {
        "turns_mean": 1.5,
        "turns_max": 2,
        "environment_tokens_mean": 2.0,
        "environment_tokens_fraction": pytest.approx(2 / 12),
    }
