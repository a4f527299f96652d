"""Streams resume from a number and never depend on what was read before."""

from collections import Counter

from megatron_rl.data.prompts import Generated, PromptStream, Shuffled, first_prompts
from megatron_rl.data.types import Prompt


def prompt(number: int) -> Prompt:
    return Prompt(f"p{number}", (number,), f"text {number}", str(number))


def test_a_stream_resumed_at_a_position_goes_on_as_if_never_stopped():
    source = Shuffled([prompt(n) for n in range(7)], seed=3)
    whole = PromptStream(source).take(40)
    stream = PromptStream(source)
    first = stream.take(13)
    assert first + PromptStream(source, stream.position).take(27) == whole


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own():
    source = Shuffled([prompt(n) for n in range(20)], seed=0)
    epochs = [[p.text for p in PromptStream(source, 20 * epoch).take(20)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_ids_of_a_stream_are_unique_over_epochs():
    ids = [p.id for p in PromptStream(Shuffled([prompt(n) for n in range(3)], seed=0)).take(30)]
    assert len(set(ids)) == 30


def test_seeds_give_different_orders():
    prompts = [prompt(n) for n in range(20)]
    assert PromptStream(Shuffled(prompts, 0)).take(20) != PromptStream(Shuffled(prompts, 1)).take(20)


def test_first_prompts_are_as_many_as_asked_or_as_there_are():
    assert len(first_prompts(Shuffled([prompt(n) for n in range(3)], 0), 10)) == 3
    assert len(first_prompts(Generated(prompt), 10)) == 10
