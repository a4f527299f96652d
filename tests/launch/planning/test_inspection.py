"""What the tokenizer and the data show before a run starts: prompts, stop tokens and files that would end it."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.inspection import Inspection, inspect_inputs
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.tasks.sample import SAMPLED_ROWS
from tests.byte_tokenizer import CHATML, save_shape, save_tokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"


def row(prompt: object, answer: object = "4") -> str:
    return json.dumps({"prompt": prompt, "answer": answer}) + "\n"


class Folder:
    """A model's folder with a byte tokenizer, and a file of prompts."""

    def __init__(self, folder: Path) -> None:
        self.model, self.data = save_shape(folder / "model"), folder / "d.jsonl"
        save_tokenizer(self.model)
        self.data.write_text("".join(row(f"{n} + {n} =") for n in range(40)))

    def inspect(self, *words: str, full: bool = False) -> Inspection:
        fixed = {"model.path": self.model, "task.name": "jsonl", "task.path": self.data, "task.max_prompt_tokens": 100}
        settings = fixed | dict(word.split("=", 1) for word in words)
        loaded = load(Run, [DEMO], [f"{key}={value}" for key, value in settings.items()])
        return inspect_inputs(loaded, model_sizes(family_of(read_hf_config(self.model))), full=full)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_run_that_works_has_no_problem_and_its_prompts_are_counted(folder):
    found = folder.inspect()
    assert (found.running, found.learning, found.warnings) == ([], [], [])
    assert found.facts == ["40 of 40 prompts were rendered and tokenized: 7 to 9 tokens, median 9"]
    assert folder.inspect("task.chat_template=true").running == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (rb'{"prompt": "cut in half \ud83d", "answer": "5"}', ["half of a surrogate pair, \\ud83d, at character 13"]),
        (rb'{"prompt": "x", "answer": "\udc00"}', ["half of a surrogate pair"]),
        (b'{"prompt": "x", "answer": ' + b"[" * 5000 + b"]" * 5000 + b"}", ["not JSON"]),
        (b"\0\0\0\0", ["not JSON"]),
        (b'{"prompt": "x", "ans', ["not JSON"]),
        (b'{"prompt": "x", "answer": ' + b"7" * 5000 + b"}", ["not JSON"]),
        (b'{"prompt": "\xff\xfe", "answer": "1"}', ["not JSON"]),
    ],
)
def test_a_line_that_cannot_be_used_is_one_problem_with_file_and_line(folder, line, words):
    folder.data.write_bytes(folder.data.read_bytes() + line + b"\n")
    (problem,) = folder.inspect().running
    assert f"{folder.data}:41" in problem
    assert all(word in problem for word in words)


def test_a_tokenizer_without_a_chat_template_is_one_problem_with_the_setting(folder):
    save_tokenizer(folder.model, template=None)
    (folder.model / "chat_template.jinja").unlink(missing_ok=True)
    (problem,) = folder.inspect("task.chat_template=true").running
    assert problem.startswith("task.chat_template = true, but the tokenizer of the model has no chat template")
    assert folder.inspect().running == []


def test_a_template_that_fails_is_one_problem_with_setting_row_and_its_words(folder):
    save_tokenizer(folder.model, template="{{ raise_exception('System role not supported') }}")
    folder.data.write_text(row("2 + 2 ="))
    (problem,) = folder.inspect("task.chat_template=true", "task.heldout_fraction=0", "evaluate.every=0").running
    for words in ("(task.chat_template) fails", "System role not supported", f"{folder.data}:1"):
        assert words in problem


def test_many_rows_that_fail_are_counted(folder):
    save_tokenizer(folder.model, template="{{ raise_exception('no') }}")
    *shown, last = folder.inspect("task.chat_template=true").running
    assert len(shown) == 5
    assert last == "40 of 40 prompts looked at cannot be used; the first are named here"


def test_a_prompt_without_tokens_is_one_problem_with_file_and_line(folder):
    save_tokenizer(folder.model, template="{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    folder.data.write_text(folder.data.read_text() + row("  \n"))
    (problem,) = folder.inspect("task.chat_template=true").running
    assert "the prompt has no token" in problem
    assert f"{folder.data}:41" in problem


def test_a_variable_that_the_template_lacks_is_one_problem(folder):
    words = ["task.chat_template=true", "task.template={enable_thinkng=false}"]
    (problem,) = folder.inspect(*words).running
    assert problem.startswith("task.template.enable_thinkng: the tokenizer's chat template has no variable")


def test_conversations_that_would_show_two_system_turns_or_an_answer_are_refused(folder):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    folder.data.write_text(row(turns))
    words = ["task.chat_template=true", "task.heldout_fraction=0", "evaluate.every=0"]
    (problem,) = folder.inspect(*words).running
    assert "the last turn of the conversation is the assistant's" in problem
    assert "task.continue_last_turn = true" in problem
    assert folder.inspect(*words, "task.continue_last_turn=true").running == []
    folder.data.write_text(row([{"role": "system", "content": "A"}, turns[0]]))
    (problem,) = folder.inspect(*words, "task.system_prompt=B").running
    assert "has a system turn, and task.system_prompt is set" in problem
    assert folder.inspect(*words).running == []


def test_a_sample_of_the_rows_is_rendered_and_all_with_full(folder):
    rows = [row(f"{n:05d} + {n:05d} =") for n in range(2000)]
    rows[1234] = row([{"role": "assistant", "content": "13579 + 24680 ="}])
    folder.data.write_text("".join(rows))
    words = ["task.chat_template=true"]
    sampled = folder.inspect(*words)
    assert sampled.running == []
    looked_at = int(sampled.facts[0].split(" of 2000 prompts")[0])
    assert SAMPLED_ROWS <= looked_at <= SAMPLED_ROWS + 3
    (problem,) = folder.inspect(*words, full=True).running
    assert f"{folder.data}:1235" in problem


def test_the_longest_and_the_shortest_row_are_in_the_sample(folder):
    rows = [row(f"{n:05d} + {n:05d} =") for n in range(2000)]
    rows[700], rows[1500] = row("x" * 90), row("y")
    folder.data.write_text("".join(rows))
    (fact,) = folder.inspect().facts
    assert "1 to 90 tokens" in fact


def test_prompts_that_are_all_too_long_or_all_held_out_are_one_problem(folder):
    (problem,) = folder.inspect("task.max_prompt_tokens=5").running
    assert "all 40 prompts looked at are longer, the shortest has 7 tokens" in problem
    folder.data.write_text(row("1 + 1 ="))
    (problem,) = folder.inspect("evaluate.every=2", "task.heldout_fraction=0.0001").running
    assert "of 1 prompts none is held out" in problem


def test_most_prompts_too_long_is_a_warning(folder):
    (warning,) = folder.inspect("task.max_prompt_tokens=8").warnings
    assert "30 of 40 prompts looked at are longer" in warning


def test_a_tokenizer_of_another_model_is_one_problem(folder):
    save_shape(folder.model, vocab_size=20, eos_token_id=2)
    found = folder.inspect()
    assert len(found.running) == 2
    assert "token 258 ends a response, but the vocabulary of the model has 20 tokens" in found.running[0]
    assert "use the tokenizer that belongs to the model" in found.running[1]


def test_without_a_stop_token_nothing_can_be_learned(folder):
    save_shape(folder.model, eos_token_id=None)
    save_tokenizer(folder.model, eos=None)
    (problem,) = folder.inspect().learning
    assert "names no token that ends a response" in problem
    assert folder.inspect("rollout.sampling.stop_token_ids=[10]").learning == []


def test_a_tokenizer_that_cannot_be_built_does_not_hide_bad_lines(folder):
    (folder.model / "tokenizer.json").write_text("{")
    folder.data.write_text("{\n")
    tokenizer, line = folder.inspect().running
    assert "cannot be built" in tokenizer
    assert f"{folder.data}:1" in line


def test_a_template_with_todays_date_is_a_warning(folder):
    save_tokenizer(folder.model, template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    (warning,) = folder.inspect("task.chat_template=true").warnings
    assert "the template writes today's date" in warning


def test_an_invented_conversation_is_compared_with_the_template(folder):
    words = ["task.chat_template=true", "environment.name=calculator", "environment.role=tool"]
    found = folder.inspect(*words)
    assert (found.running, found.warnings) == ([], [])
    assert any("is trained as the chat template renders it" in fact for fact in found.facts)
    save_tokenizer(folder.model, template=CHATML.replace("<|im_end|>", "<|endoftext|>"))
    (problem,) = folder.inspect(*words).running
    assert "add 256 ('<|endoftext|>') to rollout.sampling.stop_token_ids" in problem
    assert folder.inspect(*words, "rollout.sampling.stop_token_ids=[256]").running == []
    thoughtless = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    save_tokenizer(folder.model, template=thoughtless)
    (warning,) = folder.inspect(*words).warnings
    assert "changes turns with <think>...</think>" in warning


def test_generated_prompts_are_tokenized_too():
    loaded = load(Run, [DEMO], [])
    found = inspect_inputs(loaded, model_sizes(family_of(read_hf_config(Path(loaded.run.model.path)))))
    assert (found.running, found.learning, found.warnings) == ([], [], [])
    assert found.facts[0].startswith("16 prompts were rendered")
