"""Decoding in slots gives what decoding with a growing cache gives, whatever happens meanwhile."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from megatron_rl.inference_server.engine import PauseMode
from megatron_rl.inference_server.requests import Row, Work
from megatron_rl.inference_server.slots import Kind, size_class
from megatron_rl.inference_server.static import StaticBatch, StaticDecoder
from tests.inference_server.test_decode import LENGTHS, assert_logprobs_are_the_models
from tests.inference_server.test_engine import LONG, double, wait_for_tokens
from tests.inference_server.tiny import finished, prompts_of, running, work_of

BURSTS = (1, 5)


def assert_same(found: Sequence[Row], expected: Sequence[Row]) -> None:
    assert [row.output_ids for row in found] == [row.output_ids for row in expected]
    assert [row.finish for row in found] == [row.finish for row in expected]
    for row, other in zip(found, expected, strict=True):
        # float32, sums over caches of another width
        torch.testing.assert_close(torch.tensor(row.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)


def mixed(count: int, **more: object) -> Work:
    """Return work of rows that differ in all that a row can."""
    ways: list[Mapping[str, object]] = [
        {"temperature": 0.7},
        {"top_k": 5},
        {"temperature": 0},
        {"top_p": 0.8, "min_p": 0.05},
        {"stop_token_ids": list(range(0, 48, 5))},
        {"stop_token_ids": [1, 2, 3], "ignore_eos": True},
    ]
    prompts = (prompts_of(*LENGTHS) * count)[:count]
    params = [{"max_new_tokens": 3 + 9 * i % 80, "sampling_seed": i, **ways[i % len(ways)]} for i in range(count)]
    return work_of(prompts, params, **more)


@pytest.fixture(scope="module")
def grown(moe_folder: Path) -> list[Row]:
    with running(moe_folder) as engine:
        [rows] = finished(engine, mixed(20))
    return rows


@pytest.mark.parametrize("burst", BURSTS)
def test_slots_give_the_tokens_and_logprobs_of_a_growing_cache(model_folder: Path, burst: int) -> None:
    with running(model_folder) as engine:
        [expected] = finished(engine, mixed(20))
    with running(model_folder, burst=burst) as engine:
        [found], [again] = (finished(engine, mixed(20)) for _ in range(2))
    assert_same(found, expected)
    plain = [row for row in found if not row.params.narrows]
    assert_logprobs_are_the_models(model_folder, plain)
    # A request gets the same bits again.
    assert [(row.output_ids, row.logprobs) for row in again] == [(row.output_ids, row.logprobs) for row in found]


@pytest.mark.parametrize("burst", BURSTS)
def test_rows_that_join_and_leave_disturb_nobody(moe_folder: Path, grown: list[Row], burst: int) -> None:
    works = [mixed(20) for _ in range(2)]
    singles = [work_of(prompts_of(7, seed=9), [{"max_new_tokens": n, "sampling_seed": n}]) for n in (2, 30, 90)]
    with running(moe_folder, "continuous", max_rows=24, burst=burst) as engine:
        first, *_, second = finished(engine, works[0], *singles, works[1])
    assert_same(first, grown)
    assert_same(second, grown)


def test_slots_without_a_row_and_what_lies_behind_a_row_change_nothing(model_folder: Path) -> None:
    work, expected = (work_of(prompts_of(5, 9, 3, 4, 6), [{**LONG, "max_new_tokens": 40}] * 5) for _ in range(2))
    with running(model_folder) as engine:
        finished(engine, expected)
    with running(model_folder, burst=1) as engine:
        engine.submit(work)
        wait_for_tokens(engine)

        def poison() -> None:
            batch = engine.batch
            assert isinstance(batch, StaticBatch)
            c, step = batch.columns, batch._step
            assert step is not None
            assert step.kind.slots == 6
            c.last_B[5], c.positions_B[5], c.sampling.temperatures_B[5] = 47, 33, 1e-30
            for layer in step.cache.layers:
                layer.keys[5], layer.values[5] = 1e30, -1e30
                for slot in range(5):
                    behind = int(c.positions_B[slot]) + 1
                    layer.keys[slot, :, behind:], layer.values[slot, :, behind:] = 1e30, -1e30

        engine.call(poison).result()
        work.done.result(timeout=30)
    assert_same(work.rows, expected.rows)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_weights_that_change_in_the_middle_serve_the_next_token(moe_folder: Path, mode: PauseMode) -> None:
    prompts = prompts_of(4, 7)
    with running(moe_folder, burst=3) as engine:
        addresses = {name: tensor.data_ptr() for name, tensor in engine.model.tensors.items()}
        work = work_of(prompts, [LONG] * 2)
        engine.submit(work)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause(mode)).result()
        engine.call(lambda: engine.change_weights(double(engine), "1")).result()
        engine.call(engine.resume).result()
        work.done.result(timeout=30)
        assert {name: tensor.data_ptr() for name, tensor in engine.model.tensors.items()} == addresses
        changes = [row.versions[1][1] for row in work.rows]
        [new] = finished(engine, work_of(prompts, [LONG] * 2))
    with running(moe_folder) as engine:
        [old] = finished(engine, work_of(prompts, [LONG] * 2))
    for row, before, after, change in zip(work.rows, old, new, changes, strict=True):
        assert [version for version, _ in row.versions] == ["0", "1"]
        assert 5 <= change < 200
        assert row.output_ids[:change] == before.output_ids[:change]
        assert row.output_ids not in (before.output_ids, after.output_ids)
        assert row.num_retractions == int(mode == "retract")


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_changes_no_token(moe_folder: Path, grown: list[Row], mode: PauseMode) -> None:
    work = mixed(20)
    with running(moe_folder, burst=3) as engine:
        engine.submit(work)
        wait_for_tokens(engine)
        engine.call(lambda: engine.pause(mode)).result()
        time.sleep(0.02)
        engine.call(engine.resume).result()
        work.done.result(timeout=30)
    assert_same(work.rows, grown)


def test_a_row_can_be_taken_out_and_looked_at(moe_folder: Path) -> None:
    with running(moe_folder, burst=4) as engine:
        work = work_of(prompts_of(4, 4), [LONG, {**LONG, "max_new_tokens": 60}], rid=["one", "two"])
        engine.submit(work)
        wait_for_tokens(engine)
        engine.call(lambda: engine.update_output(work.rows[1])).result()
        seen = list(work.rows[1].output_ids)
        engine.call(lambda: engine.abort("one")).result()
        work.done.result(timeout=30)
    aborted, other = work.rows
    assert aborted.finish is not None
    assert aborted.finish["type"] == "abort"
    assert 0 < len(aborted.output_ids) == len(aborted.logprobs) < 200
    assert other.finish == {"type": "length", "length": 60}
    assert len(seen) >= 5
    assert other.output_ids[: len(seen)] == seen
    assert_logprobs_are_the_models(moe_folder, work.rows)


def test_routes_are_those_of_a_growing_cache(moe_folder: Path) -> None:
    works = [mixed(9, return_routed_experts=True) for _ in range(2)]
    for work, burst in zip(works, (None, 4), strict=True):
        with running(moe_folder, burst=burst) as engine:
            finished(engine, work)
    for row, other in zip(works[0].rows, works[1].rows, strict=True):
        assert row.routes is not None
        assert other.routes is not None
        assert len(row.routes) == len(row.prompt) + len(row.output_ids) - 1
        assert torch.equal(row.routes, other.routes)


def test_a_batch_shrinks_with_its_rows(moe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[tuple[int, int]] = []
    run = StaticDecoder.run

    def noted(decoder: StaticDecoder, kind: Kind) -> None:
        slots.append((kind.slots, kind.width))
        run(decoder, kind)

    monkeypatch.setattr(StaticDecoder, "run", noted)
    with running(moe_folder, burst=2) as engine:
        params = [{"max_new_tokens": 4 + 20 * i, "ignore_eos": True} for i in range(8)]
        [rows] = finished(engine, work_of(prompts_of(*[5] * 8), params))
    assert [len(row.output_ids) for row in rows] == [4 + 20 * i for i in range(8)]
    assert sorted({slot for slot, _ in slots}, reverse=True) == [8, 6, 4, 3, 2, 1]
    assert [slot for slot, _ in slots] == sorted((slot for slot, _ in slots), reverse=True)
    assert [width for _, width in slots] == sorted(width for _, width in slots)
    assert slots[-1][1] == 192  # 5 + 144 + 2 positions


def test_sizes() -> None:
    assert [size_class(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 25)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 32,
    ]  # fmt: skip
    assert size_class(5, 64) == 64
    assert size_class(65, 64) == 96
