"""Mistakes that trainers of this kind have made or could make, each as a change of one line, and what must detect it.

Plain data, read by the loader in ``sitecustomize.py`` and by ``benchmarks/mutations.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One line of the package replaced by a wrong one.

    Attributes:
        name: words joined by dashes.
        module: relative to ``megatron_rl``.
        right, wrong: source text; ``right`` occurs exactly once in the module.
        checks: pytest node ids, or ``prove LAYOUT OBJECTIVE``; tried in order until one detects it.
    """

    name: str
    module: str
    right: str
    wrong: str
    checks: tuple[str, ...]


SPLIT = "tests/test_loss.py::test_any_split_into_micro_batches_adds_up_to_the_whole"
CONTEXT = "tests/test_loss.py::test_context_ranks_give_the_loss_and_gradient_of_one_rank"
DETACHED = "tests/test_loss.py::test_entropies_get_no_gradient"
EQUATIONS = "tests/test_policy_loss.py::test_loss_and_gradient_equal_the_transcription"
BOUNDS = "tests/test_policy_loss.py::test_bounds_are_inclusive"
DIRECTION = "tests/test_policy_loss.py::test_direction_of_the_clip"
VOCABULARY = "tests/ops/test_vocab.py::test_known_answers"
SHARDS = "tests/ops/test_vocab.py::test_shards_of_the_vocabulary_give_the_whole_one"
HEAD = "tests/ops/test_vocab.py::test_head_equals_the_definition"

STREAM = "tests/rollout/test_stream.py"
TOO_OLD = f"{STREAM}::test_a_group_that_is_too_old_is_dropped_once_and_its_prompt_asked_for_again_in_its_place"
ANY_TIMING = f"{STREAM}::test_whatever_the_timing_no_sample_is_older_than_allowed_or_lost_or_used_twice"
LAG_0 = f"{STREAM}::test_lag_0_asks_for_what_a_synchronous_run_asks_for_and_gets_the_same"
RESAMPLING = f"{STREAM}::test_dynamic_sampling_fills_the_batch_with_groups_that_teach"
EXPERT_BIAS = "tests/policy/test_experts.py::test_ranks_that_share_an_expert_train_its_bias_alike"

CONFIG = "tests/config/test_load.py"
PRUNING = "tests/test_pruning.py"
ADAPTED = "tests/policy/test_adapted_numbers.py"
ESTIMATE = "tests/launch/planning/test_estimate.py"

MISTAKES = (
    Mistake(
        "mean-of-micro-batch-means",
        "algorithms.loss",
        "value = (inputs.weights_R * values_R).sum()",
        "value = values_R.mean() if len(values_R) else values_R.sum()",
        (SPLIT,),
    ),
    Mistake(
        "k3-with-its-linear-term-clamped",
        "algorithms.kl",
        "return torch.expm1(log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)) - log_ratio",
        "log_ratio = log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)\n"
        "    return torch.expm1(log_ratio) - log_ratio",
        ("tests/test_loss.py::test_k3_clamps_its_exponent_and_not_its_linear_term",),
    ),
    Mistake(
        "correction-by-segment-of-the-whole-response",
        "algorithms.gates",
        '"segment_ids_T" in tokens.batch else None',
        '"segment_ids_T" in tokens.batch else tokens.responses_R',
        ("tests/test_loss.py::test_a_correction_by_segments_is_by_tokens_where_the_objective_has_none",),
    ),
    Mistake(
        "icepop-as-an-indicator",
        "algorithms.correction",
        '1.0 if self.kind == "binary" else weights_R',
        '1.0 if self.kind != "mis" else weights_R',
        ("tests/test_gates.py::test_known_weights_of_the_bands",),
    ),
    Mistake(
        "opsm-for-any-sign-of-the-advantage",
        "algorithms.correction",
        "return (tokens.advantages_R < 0) & (gap_R > delta)",
        "return gap_R > delta",
        ("tests/test_gates.py::test_opsm_spares_positive_responses",),
    ),
    Mistake(
        "truncated-responses-keep-their-kl",
        "algorithms.correction",
        'columns["weights_T"] = torch.where(truncated_R, 0.0, tokens["weights_T"].double())',
        'columns["corrections_T"] = torch.where(truncated_R, 0.0, factors_R)',
        ("tests/test_gates.py::test_truncated_responses_leave_the_loss_and_stay_in_the_denominators",),
    ),
    Mistake(
        "ratio-of-the-unbiased-kl-without-gradient",
        "algorithms.kl",
        "(logprobs_R - old_logprobs_R).clamp(max=LARGEST_EXPONENT).exp()",
        "(logprobs_R - old_logprobs_R).detach().clamp(max=LARGEST_EXPONENT).exp()",
        ("tests/test_loss.py::test_the_unbiased_kl_has_the_gradient_of_the_kl_divergence",),
    ),
    Mistake(
        "plain-gradient-with-corrections",
        "algorithms.loss",
        "    plain_R = inputs.weights_R * inputs.advantages_R\n",
        "    plain_R = inputs.weights_R * inputs.advantages_R\n"
        "    plain_R = plain_R if inputs.corrections_R is None else plain_R * inputs.corrections_R\n",
        ("tests/test_loss.py::test_gradient_kept_is_relative_to_the_gradient_with_ratio_one_and_nothing_corrected",),
    ),
    Mistake(
        "segment-mean-of-one-rank",
        "algorithms.segments",
        "sum_over(inputs.context_group, sums)[:,",
        "sums[:,",
        (CONTEXT,),
    ),
    Mistake(
        "window-with-gradient",
        "algorithms.loss",
        "        cost = objective.cost(logprobs_R, inputs)\n",
        "        live = {n: getattr(inputs, n) for n in ('clip_low_R', 'clip_high_R')}\n"
        "        live = {n: c * entropies_R / entropies_R.detach() for n, c in live.items() if c is not None}\n"
        "        cost = objective.cost(logprobs_R, __import__('dataclasses').replace(inputs, **live))\n",
        (DETACHED,),
    ),
    Mistake(
        "log-prob-and-entropy-without-temperature",
        "ops.vocab",
        "return logits if temperature == 1.0 else logits / temperature",
        "return logits",
        (VOCABULARY,),
    ),
    Mistake(
        "entropy-without-temperature",
        "ops.head",
        "        logprobs_R, entropies_R, normalizers_R = finish(sums_SR, target_logits_R, shard.group)\n",
        "        logprobs_R, entropies_R, normalizers_R = finish(sums_SR, target_logits_R, shard.group)\n"
        "        untempered = [_no_sums(hidden_RH, dtype)]\n"
        "        for tile in shard.tiles:\n"
        "            logits_RC = products.into(_part(buffer, len(hidden_RH), len(weight_VH[tile])), weight_VH[tile])\n"
        "            untempered.append(shard.passes.sums(logits_RC, torch.ones_like(scale)))\n"
        "        entropies_R = finish(merge_sums(torch.stack(untempered)), target_logits_R, shard.group)[1]\n",
        (HEAD,),
    ),
    Mistake(
        "vocabulary-padding-not-masked",
        "ops.head",
        "rows = num_rows if vocab_size is None else min(max(vocab_size - first_id, 0), num_rows)",
        "rows = num_rows",
        (HEAD,),
    ),
    Mistake(
        "gradient-of-other-vocabulary-shards-zero",
        "ops.vocab",
        "    return gradient_NV.scatter_add_(",
        "    gradient_NV *= inside_N[:, None]\n    return gradient_NV.scatter_add_(",
        (SHARDS,),
    ),
    Mistake(
        "masked-tokens-counted",
        "data.types",
        'counts_B.index_add_(0, self.response_ids_T, self["loss_mask_T"].long())',
        "self.lengths_B",
        (EQUATIONS,),
    ),
    Mistake(
        "sign-of-the-advantage",
        "algorithms.objectives.base",
        "values_R = -advantages_R * torch.where",
        "values_R = advantages_R * torch.where",
        (DIRECTION, EQUATIONS),
    ),
    Mistake(
        "clip-bounds-exclusive",
        "algorithms.objectives.base",
        "(rises_R & (ratio_R <= upper_R)) | (falls_R & (ratio_R >= lower_R))",
        "(rises_R & (ratio_R < upper_R)) | (falls_R & (ratio_R > lower_R))",
        (BOUNDS,),
    ),
    Mistake(
        "clipped-side-without-regard-to-the-advantage",
        "algorithms.objectives.base",
        "(rises_R & (ratio_R <= upper_R)) | (falls_R & (ratio_R >= lower_R))",
        "(ratio_R <= upper_R) & (ratio_R >= lower_R)",
        (DIRECTION,),
    ),
    Mistake(
        "verl-averages-ranks-that-were-not-scaled",
        "integrations.verl",
        'return result.loss * (batch_info.get("dp_size") or 1), metrics',
        "return result.loss, metrics",
        ("tests/test_integrations.py::test_micro_batches_of_data_parallel_ranks_average_to_the_loss",),
    ),
    Mistake(
        "gate-on-the-engines-ratio-to-the-trainer",
        "algorithms.gates",
        "            values_R = policy - rollout_R\n",
        "            values_R = rollout_R - policy\n",
        ("tests/peers/test_losses.py::test_gradients_are_those_of_the_peers",),
    ),
    Mistake(
        "setting-rounded-to-float32",
        "algorithms.objectives.sspo",
        "reference = self.entropy_reference or tokens.mean(entropies_R)",
        "reference = torch.tensor(self.entropy_reference) if self.entropy_reference else tokens.mean(entropies_R)",
        (EQUATIONS,),
    ),
    Mistake(
        "gradient-averaged-over-data-ranks",
        "policy.model",
        "    finalize_model_grads(model, None, **kwargs)",
        "    finalize_model_grads(model, None, **kwargs)\n"
        "    for chunk in model:\n"
        "        chunk.scale_gradients(1 / parallel_state.get_data_parallel_world_size(with_context_parallel=True))",
        ("prove data=2 grpo",),
    ),
    Mistake(
        "plain-halves-in-place-of-zig-zag",
        "policy.rows",
        "    local_T = zigzag(lengths_N, rank, size)\n",
        "    starts_N = lengths_N.cumsum(0) - lengths_N\n"
        "    local_T = torch.cat([torch.arange(s + rank * n // size, s + (rank + 1) * n // size)\n"
        "                         for s, n in zip(starts_N.tolist(), lengths_N.tolist())])\n",
        ("prove context=2 gspo",),
    ),
    Mistake(
        "shards-not-marked-for-the-gradient-norm",
        "policy.engine",
        "        mark_shards(shards_of(self.chunks, self.family, self.mesh), self.mesh)\n",
        "",
        ("prove tensor=2 grpo",),
    ),
    Mistake(
        "norms-not-summed-over-sequence-parallel-ranks",
        "policy.layers",
        'setattr(parameter, "sequence_parallel", config.sequence_parallel)',
        'setattr(parameter, "sequence_parallel", False)',
        ("prove tensor=2 grpo",),
    ),
    Mistake(
        "attention-reaches-into-the-sequence-before-it-in-the-row",
        "policy.rows",
        "(starts_B + place_S).clamp(max=len(gathered_W) - 1)",
        "(starts_B + place_S - 1).clamp(0, len(gathered_W) - 1)",
        ("prove tokens=4096 grpo",),
    ),
    Mistake(
        "metrics-counted-on-every-tensor-rank",
        "distributed.mesh",
        "return self.is_last_stage and group_rank(self.tensor) == 0",
        "return self.is_last_stage",
        ("prove tensor=2 grpo",),
    ),
    Mistake(
        "groups-one-version-too-old-are-trained-on",
        "rollout.buffer",
        "oldest = step - self.config.max_lag\n",
        "oldest = step - self.config.max_lag - 1\n",
        (TOO_OLD,),
    ),
    Mistake(
        "the-fleet-samples-one-step-too-far-ahead",
        "rollout.buffer",
        "last = min(version + self.config.max_lag, self.config.steps - 1)",
        "last = min(version + self.config.max_lag + 1, self.config.steps - 1)",
        (LAG_0,),
    ),
    Mistake(
        "groups-without-a-signal-fill-the-batch",
        "rollout.buffer",
        "needed -= finished.has_signal",
        "needed -= 1",
        (RESAMPLING,),
    ),
    Mistake(
        "every-epoch-in-the-same-order",
        "data.prompts",
        "fold_seed((seed, epoch))",
        "fold_seed((seed, 0))",
        ("tests/data/test_prompts.py::test_each_epoch_has_every_prompt_once_in_an_order_of_its_own",),
    ),
    Mistake(
        "one-seed-for-all-responses-to-a-prompt",
        "fleet.request_plan",
        "fold_seed((*seeds, prompt_hash, repeat, index))",
        "fold_seed((*seeds, prompt_hash, repeat, 0))",
        ("tests/fleet/test_fleet.py::test_groups_come_in_order_with_ids_and_seeds_of_their_own",),
    ),
    Mistake(
        "last-token-predicts-the-next-sequence",
        "data.pack",
        " & ~self._starts_T[1:]",
        "",
        ("tests/data/test_pack.py::test_rows_hold_every_token_once_and_predict_within_sequences",),
    ),
    Mistake(
        "checksum-without-the-last-bytes",
        "weights.checksum",
        "    tails[:, : length - whole] = data[:, whole:]\n",
        "",
        ("tests/weights/test_checksum.py::test_the_sum_is_the_one_of_plain_integers",),
    ),
    Mistake(
        "a-server-that-missed-a-push-keeps-its-old-weights",
        "fleet.sync",
        "if self.version is None or member.version == self.version:",
        "if self.version is None or member.version is not None:",
        ("tests/fleet/test_fleet.py::test_a_server_that_missed_a_push_gets_it_before_it_gets_a_prompt",),
    ),
    Mistake(
        "a-checkpoint-complete-before-all-ranks-have-written",
        "train.checkpoints",
        "while not all(part.exists() for part in parts):",
        "while not any(part.exists() for part in parts):",
        ("tests/train/test_checkpoint_files.py::test_a_kill_at_any_moment_leaves_the_last_good_checkpoint",),
    ),
    Mistake(
        "damaged-checkpoint-files-are-loaded",
        "models.sharded_files",
        " or _digest(values) != entry.sha256",
        "",
        ("tests/train/test_checkpoint_files.py::test_damage_is_an_error_that_names_the_file_and_the_older_checkpoint",),
    ),
    Mistake(
        "a-resumed-run-orders-groups-in-progress-with-other-seeds",
        "rollout.buffer_state",
        'for number, _, pending in saved["orders"] for slot in pending}',
        'for number, _, pending in saved["orders"][:0] for slot in pending}',
        (f"{STREAM}::test_a_stop_while_waiting_loses_nothing", ANY_TIMING),
    ),
    Mistake(
        "options-of-the-previous-objective-survive",
        "config.load",
        "merged[name] = dict(value)",
        "merged[name] = {**below, **value}",
        (f"{CONFIG}::test_a_table_with_another_discriminator_replaces_the_old_one",),
    ),
    Mistake(
        "paths-relative-to-the-working-directory",
        "config.load",
        "str((folder / Path(value).expanduser()).absolute())",
        "str(Path(value).expanduser().absolute())",
        (f"{CONFIG}::test_input_paths_are_relative_to_their_file_and_overrides_to_the_working_directory",),
    ),
    Mistake(
        "optimizer-shards-counted-without-expert-replicas",
        "launch.planning.memory",
        "-(-counts.expert // layout.expert_data)",
        "-(-counts.expert // layout.data)",
        (f"{ESTIMATE}::test_weights_gradients_and_optimizer_by_hand",),
    ),
    Mistake(
        "one-micro-batch-in-flight-too-few",
        "launch.planning.activations",
        "min(warm_up + 1, microbatches * chunks)",
        "min(warm_up, microbatches * chunks)",
        (f"{ESTIMATE}::test_micro_batches_in_flight",),
    ),
    Mistake(
        "layers-of-virtual-stages-in-contiguous-blocks",
        "launch.planning.stages",
        "(chunk * layout.pipeline + stage) * size",
        "(stage * layout.virtual_pipeline + chunk) * size",
        ("tests/launch/planning/test_parameters.py::test_layers_per_stage_equal_megatron_core_s_assignment",),
    ),
    Mistake(
        "reward-weights-ignored",
        "tasks.reward",
        "sum(self.weights[name] * reward for name, reward in rewards.items())",
        "sum(rewards.values())",
        ("tests/tasks/test_rewards.py::test_the_score_is_the_weighted_sum_of_rewards",),
    ),
    Mistake(
        "truncated-responses-are-verified",
        "tasks.base",
        'if response.finish_reason == "stop":',
        'if response.finish_reason in ("stop", "length"):',
        ("tests/tasks/test_jsonl.py::test_verifiers_by_name",),
    ),
    Mistake(
        "held-out-prompts-are-trained-on",
        "tasks.jsonl",
        "train = [row for row in rows if not in_heldout_split(row.text, options.heldout_fraction)]",
        "train = rows",
        ("tests/tasks/test_jsonl.py::test_splits_are_disjoint_and_do_not_depend_on_the_order_of_lines",),
    ),
    Mistake(
        "pass-at-k-with-replacement",
        "evaluate.statistics",
        "return 1.0 - comb(n - c, k) / comb(n, k)",
        "return 1.0 - (1.0 - c / n) ** k",
        ("tests/evaluate/test_statistics.py::test_pass_at_k_has_the_known_answers",),
    ),
    Mistake(
        "samples-of-a-prompt-counted-as-independent",
        "evaluate.statistics",
        "effective, t = count / ratio, student_quantile(count - 1)",
        "effective, t = count / min(ratio, 0.1), student_quantile(count - 1)",
        ("tests/evaluate/test_statistics.py::test_the_interval_covers_the_truth",),
    ),
    Mistake(
        "fused-parts-converted-in-reverse-order",
        "convert.to_megatron",
        "tensor = name.rule.shard([reader.read(hf_name) for hf_name in name.hf_names(layer, expert)], 0, 1)",
        "tensor = name.rule.shard([reader.read(hf_name) for hf_name in name.hf_names(layer, expert)[::-1]], 0, 1)",
        ("tests/convert/test_convert.py::test_a_round_trip_gives_the_same_file",),
    ),
    Mistake(
        "prefix-minimum-with-the-token-itself",
        "algorithms.segments",
        "minima_N = torch.where(index_N > 0, values_N.roll(1), infinite_N)",
        "minima_N = values_N",
        (EQUATIONS,),
    ),
    Mistake(
        "prefix-minimum-of-this-context-rank-only",
        "algorithms.segments",
        "values_N, index_N = sum_over(inputs.context_group, row)",
        "values_N, index_N = row",
        (CONTEXT,),
    ),
    Mistake(
        "entropy-bonus-without-a-gradient",
        "algorithms.loss",
        "values_R - inputs.entropy_coefficients_R * entropies_R",
        "values_R - inputs.entropy_coefficients_R * entropies_R.detach()",
        ("tests/test_entropy_bonus.py::test_the_gradient_is_that_of_the_entropy_itself",),
    ),
    Mistake(
        "adapted-numbers-start-anew-after-a-resume",
        "train.checkpoints",
        "self.loss_state.restore(json.loads(read_checked(newest, LOSS, meta)))",
        "json.loads(read_checked(newest, LOSS, meta))",
        ("tests/train/test_checkpoint_files.py::test_the_numbers_that_a_loss_adapts_come_back_exactly",),
    ),
    Mistake(
        "sampling-mask-in-the-forward-pass-only",
        "ops.head",
        "ctx.mask.apply(logits_RC, tile.start)",
        "pass",
        ("tests/ops/test_vocab.py::test_a_sampling_mask_restricts_the_head_to_the_kept_ids",),
    ),
    Mistake(
        "nan-passes-the-proof-of-layouts",
        "prove.compare",
        "if not value <= bounds[key]",
        "if value > bounds[key]",
        ("tests/distributed/test_prove_compare.py::test_a_difference_that_is_nan_fails",),
    ),
    Mistake(
        "expert-bias-gradient-lost-on-other-expert-tensor-ranks",
        "policy.experts",
        "bias_TH = bias_TH if self.adds_bias else bias_TH - bias_TH.detach()",
        "bias_TH = bias_TH if self.adds_bias else torch.zeros_like(bias_TH)",
        (EXPERT_BIAS,),
    ),
    Mistake(
        "expert-bias-added-on-every-expert-tensor-rank",
        "policy.experts",
        "self.adds_bias = pg_collection.expt_tp.rank() == 0",
        "self.adds_bias = True",
        (EXPERT_BIAS,),
    ),
    Mistake(
        "expert-bias-counted-by-every-rank-in-the-gradient-norm",
        "policy.hf_weights",
        "counts = counts or group_rank(mesh.expert_tensor) == 0",
        "counts = True",
        ("tests/policy/test_experts.py::test_the_norm_counts_every_bias_of_an_expert_once",),
    ),
    Mistake(
        "replayed-experts-keep-the-gates-of-the-live-ones",
        "policy.routing_replay",
        "return scores.gather(1, taken_TK), taken_TK",
        "return values_TK, taken_TK",
        ("tests/policy/test_replay.py::test_given_experts_are_taken_with_the_routers_own_gates",),
    ),
    Mistake(
        "denominators-of-one-replica",
        "algorithms.tokens",
        "sums = total(torch.stack(counts)).tolist()",
        "sums = torch.stack(counts).tolist()",
        ("tests/test_loss.py::test_parts_of_a_minibatch_are_prepared_as_in_the_whole",),
    ),
    Mistake(
        "denominators-without-pruned-responses",
        "algorithms.tokens",
        "counts_R, sums[-2], sums[-1], sums[1], total",
        "counts_R, sums[0], sums[1], sums[1], total",
        (f"{PRUNING}::test_the_weights_are_those_before_pruning_times_the_factor_of_the_response",),
    ),
    Mistake(
        "means-over-tokens-divided-by-pruned-ones-too",
        "algorithms.tokens",
        "values_R.double().sum()) / self.num_present",
        "values_R.double().sum()) / self.num_tokens",
        (f"{PRUNING}::test_means_over_tokens_are_over_those_that_are_left",),
    ),
    Mistake(
        "pruned-terms-without-their-factor",
        "algorithms.loss",
        'weights_R * batch["pruning_weights_B"][tokens.responses_R]',
        "weights_R",
        (f"{PRUNING}::test_the_weights_are_those_before_pruning_times_the_factor_of_the_response",),
    ),
    Mistake(
        "pruning-drawn-alike-in-every-step",
        "rollout.collect",
        "fold_seed((run.train.seed, step, PRUNING_DRAW))",
        "fold_seed((run.train.seed, PRUNING_DRAW))",
        (f"{PRUNING}::test_the_draw_is_of_the_seed_and_the_step",),
    ),
    Mistake(
        "arm-on-uniform-groups",
        "algorithms.arm",
        "return alpha * ((signals[groups_B] > 0) & verified_B).double()",
        "return alpha * verified_B.double()",
        ("tests/test_advantages.py::test_arm_leaves_uniform_groups_and_unverified_responses",),
    ),
    Mistake(
        "confidence-of-the-prompt-with-its-gaps-of-the-response",
        "algorithms.arm",
        "prompt_T = seen_T == before_B[minibatch.response_ids_T]",
        'prompt_T = ~minibatch["loss_mask_T"]',
        (f"{PRUNING}::test_tokens_of_prompts_are_those_before_the_first_trained_one_that_something_predicts",),
    ),
    Mistake(
        "numbers-adapted-from-one-part",
        "api",
        "sums = total(torch.stack([value.cpu() for value in loss.metrics.sums.values()]))",
        "sums = torch.stack([value.cpu() for value in loss.metrics.sums.values()])",
        ("tests/test_state_of_parts.py::test_a_function_that_adds_over_parts_adapts_every_part_alike",),
    ),
    Mistake(
        "counts-of-a-part-adapt-its-numbers",
        "api",
        "if adapted.values and not isinstance(totals, Totals):\n        total = totals or only_part",
        "if adapted.values:\n        total = only_part if totals is None or isinstance(totals, Totals) else totals",
        ("tests/test_state_of_parts.py::test_added_sums_adapt_the_numbers_as_the_whole_mini_batch",),
    ),
    Mistake(
        "numbers-adapted-from-sums-of-one-replica",
        "policy.engine",
        "totals, largest = sum_over(world, local_sums).cpu(), max_over(world, local_maxima).cpu()",
        "totals, largest = sum_over(self.mesh.replica, local_sums).cpu(), max_over(world, local_maxima).cpu()",
        (f"{ADAPTED}::test_adapted_numbers_are_equal_on_all_ranks_and_those_of_one_rank",),
    ),
    Mistake(
        "rows-of-the-next-replica",
        "data.pack",
        "for members in self.bins[replica::replicas]:",
        "for members in self.bins[(replica + 1) % replicas :: replicas]:",
        ("tests/data/test_pack.py::test_replicas_own_each_sequence_once_and_have_the_rows_of_the_whole",),
    ),
    Mistake(
        "every-stage-gets-all-routes",
        "policy.routing_replay",
        "return tuple(sorted(routers))",
        "return tuple(places.values())",
        ("tests/policy/test_replicas.py::test_a_rank_holds_its_own_tokens_and_all_together_compute_the_step",),
    ),
    Mistake(
        "a-call-that-returned-counts-as-finished",
        "distributed.ledger",
        "entry.left = not works",
        "entry.left = True",
        ("tests/observability/test_hang_watchdog.py::test_asynchronous_work_is_asked_and_dropped_work_is_done",),
    ),
    Mistake(
        "a-turn-that-another-token-ends-is-continued",
        "tasks.turn_format",
        "        if last_token != self._end_id:\n            return None\n",
        "",
        ("tests/tasks/test_turn_format.py::test_a_turn_that_another_token_ends_is_the_last",),
    ),
    Mistake(
        "control-tokens-of-data-stay-tokens",
        "tasks.render",
        "return self.options.chat_template if setting is None else setting",
        "return bool(setting)",
        ("tests/tasks/test_turn_format.py::test_control_tokens_in_data_and_tool_text_are_characters",),
    ),
    Mistake(
        "mismatch-limit-in-the-first-step",
        "observability.mismatch_report",
        "too_large = self._steps > 1 and self._exceeds_limit(found)",
        "too_large = self._exceeds_limit(found)",
        ("tests/observability/test_mismatch.py::test_the_file_lists_the_worst_tokens_with_name_text_and_place",),
    ),
    Mistake(
        "warning-of-a-cause-repeated",
        "observability.learning_watch",
        "            if self._lasted[cause] == CONSECUTIVE_STEPS and cause not in self._reported:\n",
        "            if self._lasted[cause] == CONSECUTIVE_STEPS:\n",
        ("tests/observability/test_learning_watch.py::test_a_cause_is_reported_once_and_only_if_it_lasts",),
    ),
    Mistake(
        "half-a-line-stays-after-a-full-disk",
        "observability.disk",
        "                os.ftruncate(self._descriptor, size)\n",
        "                pass\n",
        ("tests/observability/test_disk.py::test_a_line_that_does_not_fit_is_removed_again",),
    ),
    Mistake(
        "a-token-beyond-the-vocabulary-is-accepted",
        "fleet.protocol",
        "if len(values) and not 0 <= ids.min() <= ids.max() < vocabulary:",
        "if len(values) and not 0 <= ids.min() <= ids.max() < 1 << 31:",
        ("tests/fleet/test_fleet.py::test_a_server_that_answers_wrongly_is_left_out",),
    ),
    Mistake(
        "rows-of-log-probs-may-have-any-number-of-values",
        "fleet.answer_columns",
        "(columns[2] == _MARK).all() and _are_integers(flat, columns[1])",
        "True",
        ("tests/fleet/test_answer_columns.py::test_an_unusual_row_is_left_to_the_general_parser",),
    ),
    Mistake(
        "a-fraction-as-a-token-id",
        "fleet.answer_columns",
        "return False  # a number with a fraction has more characters than digits before the point",
        "pass",
        ("tests/fleet/test_answer_columns.py::test_an_unusual_row_is_left_to_the_general_parser",),
    ),
    Mistake(
        "full-shared-memory-loses-an-answer",
        "fleet.channel",
        "is_shared = descriptor is not None",
        "is_shared = size > MAX_INLINE_BYTES",
        ("tests/fleet/test_receivers.py::test_full_shared_memory_is_one_message_and_loses_no_result",),
    ),
    Mistake(
        "rows-dealt-to-replicas-in-the-order-of-their-numbers",
        "data.pack",
        "places = sorted(range(replicas), key=lambda replica: (loads[replica], replica))",
        "places = list(range(replicas))",
        ("tests/data/test_pack.py::test_balanced_replicas_have_even_costs_of_attention",),
    ),
    Mistake(
        "jobs-of-a-lost-verifier-host-wait-for-ever",
        "tasks.hosts",
        "self._send(again)",
        "pass",
        ("tests/tasks/test_verifier_hosts.py::test_a_host_that_joins_takes_what_waits",),
    ),
)
