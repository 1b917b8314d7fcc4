"""Typical mistakes in RLHF code: for each, the wrong code, and the test that must fail with it.

    make mutants                                        # all of them, and a sample of generated mutants (mutation.py)
    python tests/mutation/mutants.py "last token" kl    # those whose description contains one of these texts

Each mistake replaces a piece of the source, which must occur exactly once, in a copy of the tree; then its test is run.
A mistake has survived if the test passes, and is stale if its code or its test no longer exists. Either makes the exit
status 1. mutation.py runs thousands of generated mutants; this list is written to be read.
"""

import sys
from functools import partial

from forks import ROOT, Forks, run_pytest

MISTAKES = {  # file: {test that must fail: [(description, right code, wrong code), ...]}
    "dpo.py": {
        "test_dpo::test_dpo_loss_and_gradient_are_those_of_the_paper_for_each_pair": [
            (
                "DPO without the reference: the log-probability itself is the implicit reward",
                "cfg.beta * (logprobs - ref_logprobs)",
                "cfg.beta * logprobs",
            ),
        ],
        "test_dpo::test_with_labels_of_bradley_terry_the_gradient_of_dpo_is_0_at_the_policy_pi_star": [
            ("DPO without beta", "cfg.beta * (logprobs - ref_logprobs)", "(logprobs - ref_logprobs)"),
        ],
        "test_dpo::test_a_pair_of_equal_scores_has_no_loss_and_no_gradient": [
            (
                "a pair of equal scores counts twice, once in each order",
                "preferred = groups[:, :, None] > groups[:, None, :]",
                "preferred = groups[:, :, None] >= groups[:, None, :]",
            ),
        ],
        "test_dpo::test_weighted_loss_has_the_weights_of_pi_star_within_each_prompt": [
            (
                "weights are normalized over all prompts, so that easy prompts have all the weight",
                "(scores.view(-1, cfg.samples_per_prompt) / cfg.beta).softmax(1)",
                "(scores / cfg.beta).softmax(0).view(-1, cfg.samples_per_prompt)",
            ),
        ],
        "test_dpo::test_the_reference_samples_and_the_policy_does_not": [
            (
                "the policy samples instead of the reference",
                "batch = rollout(ref_policy, tokenizer",
                "batch = rollout(policy, tokenizer",
            ),
        ],
        "test_dpo::test_a_response_has_the_log_probability_of_its_tokens_up_to_and_including_the_end": [
            (
                "the log-probability of a response includes the padding after its end",
                "return logprobs.where(mask, 0).sum(1)",
                "return logprobs.sum(1)",
            ),
        ],
    },
    "ppo.py": {
        "test_learning::test_reward_shaping_does_not_change_the_optimum": [
            (
                "the score so far is also a reward",
                "gae(rewards, values + potentials, mask",
                "gae(rewards + potentials, values + potentials, mask",
            ),
        ],
        "test_ppo::test_with_shaping_a_value_is_the_value_head_plus_the_score_of_the_text_so_far": [
            (
                "the value head learns the whole return, which the potential then counts twice",
                "returns = (returns - potentials).where(mask, 0)",
                "returns = returns.where(mask, 0)",
            ),
            (
                "the potential is not a part of the value",
                "gae(rewards, values + potentials, mask",
                "gae(rewards, values, mask",
            ),
        ],
        "test_ppo::test_score_lands_on_the_last_real_token_and_kl_on_every_one": [
            (
                "the score is given at the last column, not at the last token of each response",
                "last = mask.sum(1, keepdim=True) - 1",
                "last = torch.full_like(mask[:, :1].long(), mask.shape[1] - 1)",
            ),
        ],
        "test_learning::test_kl_penalty_alone_moves_the_policy_back_to_its_reference": [
            ("the KL penalty has the wrong sign", "(-kl_coef * kl)", "(kl_coef * kl)"),
        ],
        "test_learning::test_policy_reaches_the_optimum_of_its_objective": [
            (
                "k3 instead of k1 as a reward, which has a different gradient",
                "kl = (logprobs - ref_logprobs).where(mask, 0)",
                "kl = ((ref_logprobs - logprobs).exp() - 1 + logprobs - ref_logprobs).where(mask, 0)",
            ),
        ],
        "test_learning::test_policy_learns_to_end_its_response": [
            (
                "<|endoftext|> is masked out like padding, so that no gradient says when to end a response",
                "return is_eos.cumsum(1) - is_eos.long() == 0",
                "return (is_eos.cumsum(1) == 0).index_fill(1, is_eos.new_zeros(1).long(), True)",
            ),
        ],
        "test_ppo::test_gae_gives_the_golden_numbers": [
            (
                "GAE uses the values after the end of a response",
                "rewards, values = rewards.where(mask, 0), values.where(mask, 0)",
                "rewards = rewards.where(mask, 0)",
            ),
            ("GAE without lambda", "delta + gamma * lam * advantage", "delta + gamma * advantage"),
        ],
        "test_ppo::test_with_whitened_rewards_the_scores_so_far_are_in_their_unit": [
            (
                "the potentials keep the unit of the scores when rewards are whitened",
                "potentials = potentials / (rewards[real].std() + 1e-8)",
                "potentials = potentials + 0",
            ),
        ],
        "test_ppo::test_whitening_uses_all_real_tokens_of_the_rollout": [
            (
                "padding is included in the mean when advantages are whitened",
                "real, whitened = x[mask]",
                "real, whitened = x.flatten()",
            ),
        ],
        "test_ppo::test_whitening_one_token_or_equal_tokens_is_finite": [
            ("the standard deviation of one token is nan", "if len(real) > 1:", "if len(real) > 0:"),
        ],
        "test_ppo::test_rollout_whitens_advantages_once_and_does_not_whiten_returns": [
            (
                "each response is whitened separately, so that good and bad ones get the same advantages",
                "advantages = whiten(advantages, real)  # over",
                "advantages = torch.cat([whiten(a[None], m[None]) for a, m in zip(advantages, mask)])  # over",
            ),
            (
                "returns are computed from whitened advantages",
                "advantages = whiten(advantages, real)  # over",
                "advantages = whiten(advantages, real); returns = advantages + values  # over",
            ),
        ],
        "test_ppo::test_rloo_gives_the_golden_numbers": [
            (
                "the RLOO baseline includes the response itself",
                "else (k - 1) / k  #",
                "else 1.0  #",
            ),
            (
                "a group has responses to different prompts",
                "groups = rewards.view(-1, k)",
                "groups = rewards.view(k, -1).T",
            ),
        ],
        "test_ppo::test_grpo_gives_the_golden_numbers": [
            ("GRPO divides by the standard deviation over all prompts", "groups.std(1, keepdim=True)", "groups.std()"),
        ],
        "test_ppo::test_every_token_of_a_response_has_the_advantage_of_its_total_reward": [
            (
                "RLOO and GRPO ignore the KL penalty",
                "group_advantages(rewards.sum(1), cfg)",
                "group_advantages(scores.to(kl.dtype), cfg)",
            ),
        ],
        "test_ppo::test_score_clip_applies_to_the_score_and_not_to_the_kl": [
            (
                "the score clip is applied to the sum of score and KL penalty",
                "rewards = token_rewards(penalized.to(kl.dtype), kl, mask, kl_coef)",
                "rewards = token_rewards(penalized.to(kl.dtype), kl, mask, kl_coef).clamp(-5, 5)",
            ),
        ],
        "test_ppo::test_missing_eos_penalty_ignores_the_prompt": [
            (
                "<|endoftext|> in the prompt counts as the end of the response",
                "ended = (sequences[:, prompt_len:] == eos_id).any(1)",
                "ended = (sequences == eos_id).any(1)",
            ),
        ],
        "test_ppo::test_clipped_surrogate_is_pessimistic_on_both_sides": [
            (
                "the ratio is clipped from above only",
                "ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)",
                "ratio.clamp(max=1 + cfg.clip_eps)",
            ),
            (
                "the minimum of two losses instead of the maximum",
                "torch.max(-advantages * ratio, -advantages * clipped)",
                "torch.min(-advantages * ratio, -advantages * clipped)",
            ),
        ],
        "test_ppo::test_first_gradient_is_the_vanilla_policy_gradient": [
            ("the ratio is inverted", "log_ratio = logprobs - old_logprobs", "log_ratio = old_logprobs - logprobs"),
        ],
        "test_ppo::test_controller_clips_its_error_at_one_fifth": [
            (
                "the error of the adaptive KL controller is not clipped",
                "error = min(max(kl / self.target - 1, -0.2), 0.2)",
                "error = kl / self.target - 1",
            ),
        ],
        "test_ppo::test_without_a_step_every_ratio_is_1_in_every_epoch": [
            (
                "the update computes log-probabilities without the temperature",
                "policy(batch.sequences[micro_batch], batch.prompt_len, cfg.temperature)",
                "policy(batch.sequences[micro_batch], batch.prompt_len)",
            ),
        ],
        "test_ppo_main::test_sampling_and_minibatches_have_seeds_of_their_own_for_each_step": [
            (
                "the minibatches of all rollouts have the same order",
                'random_generator("cpu", cfg.seed, step)',
                'random_generator("cpu", cfg.seed)',
            ),
        ],
        "test_compile::test_a_compiled_rollout_keeps_the_autograd_graph_of_one_micro_batch_at_a_time": [
            ("a rollout keeps the autograd graphs of all its episodes", "ranks.gather(x.detach())", "ranks.gather(x)"),
        ],
        "test_compile::test_the_first_ratio_is_1_when_every_graph_rounds_differently": [
            (
                "rollout and update round differently, so that the first ratio is not 1",
                "torch.set_grad_enabled(cfg.compile)",
                "torch.no_grad()",
            ),
        ],
        "test_ppo::test_reference_keeps_the_initial_weights_of_the_policy": [
            (
                "the reference is the policy itself, so that the KL is 0",
                "copy.deepcopy(policy).eval().requires_grad_(False)",
                "policy",
            ),
        ],
        "test_reward::test_a_character_split_between_prompt_and_response_is_complete_for_the_classifier": [
            (
                "prompt and response are decoded separately",
                "texts, clip = decode(ids, tokenizer), cfg",
                "texts, clip = [a + b for a, b in zip(decode(prompts, tokenizer), "
                "decode(sequences[:, prompt_len:], tokenizer))], cfg",
            ),
        ],
        "test_ppo::test_micro_batch_size_does_not_change_the_step": [
            (
                "gradient accumulation averages the means of micro-batches",
                "weight = mask.sum() / tokens",
                "weight = len(micro_batch) / len(rows)",
            ),
        ],
        "test_resume::test_ppo_killed_in_its_second_pass_over_the_prompts_is_resumed_exactly": [
            ("a resumed run starts with the initial KL coefficient", 'saved = ("coef",)', "saved = ()"),
        ],
        "test_distributed::test_an_update_by_two_processes_equals_that_by_one": [
            (
                "each process divides its loss by the tokens of all processes, so that gradients are too small",
                "batch.mask[rows].sum() / ranks.size",
                "batch.mask[rows].sum()",
            ),
        ],
        "test_distributed::test_processes_divide_the_prompts_and_sample_with_different_seeds": [
            (
                "all processes sample with the same random numbers",
                "random_generator(device, cfg.seed, step, ranks.rank)",
                "random_generator(device, cfg.seed, step)",
            ),
        ],
    },
    "model.py": {
        "test_model::test_logits_are_those_of_transformers": [
            ("the exact GELU instead of GPT-2's approximation", 'approximate="tanh"', 'approximate="none"'),
        ],
        "test_model::test_a_cached_decode_step_gives_the_logits_of_a_full_forward": [
            (
                "a causal mask is applied to a single token with a cache",
                "causal = cache is None or L > 1",
                "causal = True",
            ),
            ("positions start at 0 in every decoding step", "slice(seen, end)", "slice(end - seen)"),
        ],
        "test_model::test_generate_samples_from_the_distribution_that_the_policy_reports": [
            (
                "the temperature is applied in sampling only",
                "logits = self.gpt2.logits(hidden / temperature)  # (B, T, V)",
                "logits = self.gpt2.logits(hidden)",
            ),
        ],
        "test_model::test_a_value_is_read_from_the_hidden_state_before_its_token": [
            (
                "values are read one position late",
                "values = self.value_head(hidden)",
                "values = self.value_head(hidden.roll(-1, 1))",
            ),
        ],
        "test_ppo::test_without_a_step_every_ratio_is_1_in_every_epoch": [
            (
                "dropout is active in training mode",
                'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
                'return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), 0.1, self.training)',
            ),
        ],
        "test_model::test_bf16_rounds_the_trunk_but_not_the_logits": [
            (
                "logits are computed in bf16",
                "return linear(hidden, weight)",
                "return linear(hidden.bfloat16(), weight.bfloat16()).to(weight.dtype)",
            ),
        ],
        "test_model::test_gradients_are_those_of_transformers": [
            (
                "the tied embedding gets no gradient from the LM head",
                "return linear(hidden, weight)",
                "return linear(hidden, weight.detach())",
            ),
        ],
        "test_model::test_embedding_rows_without_a_token_have_no_logits_and_are_never_sampled": [
            ("embedding rows without a token can be sampled", "weight = weight[: self.n_tokens]", "pass"),
        ],
        "test_model::test_values_are_zero_before_training": [
            ("the value head starts with random weights", "nn.init.zeros_(self.value_head.weight)", "pass"),
        ],
        "test_model::test_a_row_is_padded_with_eos_after_its_first_one_and_no_other_token_changes": [
            (
                "responses continue after <|endoftext|>",
                "torch.where(ended, eos_id, draw(logits, generator, u)[:, None])",
                "draw(logits, generator, u)[:, None]",
            ),
        ],
    },
    "runtime/decoding.py": {
        "test_decoding::test_nan_values_left_in_the_static_cache_do_not_change_later_responses": [
            (
                "masked entries of the cache stay nan, and nan times 0 is nan",
                "self.buffer[..., cache.filled :, :] = 0",
                "pass",
            ),
        ],
        "test_decoding::test_a_static_step_gives_the_logits_of_a_full_forward": [
            (
                "a static step does not attend to its own token",
                "self.places <= self.position",
                "self.places < self.position",
            ),
            ("the position of a static step stays the same", "self.cache.position += 1", "pass"),
        ],
        "test_decoding::test_a_step_with_bf16_copies_equals_one_under_autocast_after_each_update_of_the_weights": [
            (
                "the policy that generates keeps the weights of the first rollout",
                "torch._foreach_copy_(self.copies, self.originals)",
                "pass",
            ),
        ],
        "test_decoding::test_weights_are_converted_to_bf16_once_per_call_of_generate": [
            ("autocast converts the weights for each token", "Linear) and low)", "Linear) and False)"),
        ],
    },
    "runtime/self_check.py": {
        "test_self_check::test_the_self_check_refuses_a_temperature_in_the_cached_pass_only": [
            ("the self-check always uses temperature 1", "prompts.shape[1], cfg.temperature", "prompts.shape[1], 1.0"),
        ],
    },
    "runtime/device.py": {
        "test_device::test_onednn_computes_products_on_amd_with_avx512_if_they_are_precise": [
            ("products are rounded to bf16 on CPUs that can", "if not products_are_precise():", "if False:"),
        ],
    },
    "runtime/optimizer.py": {
        "test_ppo::test_a_minibatch_leaves_no_gradient_for_the_next": [
            ("gradients are not cleared after a step", "            parameter.grad = None\n", "            pass\n"),
        ],
        "test_optimizer::test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted": [
            ("a step is taken with a gradient of nan", "if math.isfinite(norm):", "if True:"),
        ],
        "test_distributed::test_an_update_by_two_processes_equals_that_by_one": [
            ("gradients are not averaged over processes", "self.ranks.average_gradients(self.model)", "pass"),
        ],
        "test_resume::test_a_skipped_rollout_is_counted_and_shown_and_a_run_killed_after_it_is_resumed_exactly": [
            (
                "a checkpoint does not have the number of skipped steps",
                'saved = ("skipped", "in_a_row", "scaler_state")',
                'saved = ("in_a_row", "scaler_state")',
            ),
        ],
        "test_resume::test_a_run_in_float16_killed_and_resumed_equals_an_uninterrupted_run": [
            (
                "a checkpoint does not have the scale of the loss",
                'saved = ("skipped", "in_a_row", "scaler_state")',
                'saved = ("skipped", "in_a_row")',
            ),
        ],
        "test_ppo::test_an_update_in_float16_has_the_gradient_of_one_in_float32": [
            (
                "the loss is not scaled in float16, where small gradients are 0",
                "self.scaler.scale(loss).backward()",
                "loss.backward(); self.scaler.scale(loss); self.scaler.update(1.0)",
            ),
        ],
        "test_optimizer::test_in_float16_a_step_clips_the_gradient_without_the_scale_and_returns_its_norm": [
            ("gradients are clipped with the scale of the loss", "self.scaler.unscale_(optimizer)", "pass"),
        ],
        "test_optimizer::test_an_overflow_in_float16_halves_the_scale_and_does_not_end_the_run_until_the_scale_is_1": [
            ("overflows end a run, although they are normal", "elif self.scaler.get_scale() > 1:", "elif False:"),
        ],
    },
    "runtime/monitor.py": {
        "test_ppo::test_metrics_sum_kl_over_a_response_and_average_over_responses": [
            (
                "the KL of a response is logged as a mean over its tokens, not as their sum",
                "kl = batch.kl.where(mask, 0)",
                "kl = batch.kl.where(mask, 0) / mask.sum(1, keepdim=True)",
            ),
        ],
        "test_ppo::test_the_perplexity_of_a_rollout_is_that_of_evaluate": [
            (
                "fluency is measured by the policy that wrote the text, not by the reference",
                "(kl - batch.logprobs)[real]",
                "(-batch.logprobs)[real]",
            ),
        ],
        "test_guards::test_there_is_an_alarm_if_the_perplexity_is_above_a_multiple_of_that_of_the_first_rollout": [
            (
                "the perplexity is compared with the rollout before, so that a slow rise is never seen",
                '        if self.first_perplexity is None:\n            self.first_perplexity = metrics["perplexity"]\n'
                '        kl, perplexity, first = metrics["kl"], metrics["perplexity"], self.first_perplexity\n',
                '        kl, perplexity, first = metrics["kl"], metrics["perplexity"], self.first_perplexity or 1e9\n'
                "        self.first_perplexity = perplexity\n",
            ),
        ],
        "test_monitor::test_a_checkpoint_restores_the_state_of_every_part": [
            (
                "a resumed run compares its perplexity with that of a policy that was already trained",
                'saved = ("history", "first_perplexity")',
                'saved = ("history",)',
            ),
        ],
    },
    "runtime/checkpoint.py": {
        "test_finetune::test_a_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_bit": [
            (
                "the moments of Adam are not restored",
                'optimizer.load_state_dict({"state": restored,',
                'dict({"state": restored,',
            ),
        ],
        "test_checkpoint::test_a_save_that_fails_leaves_the_old_files_and_no_temporary_ones": [
            (
                "a model is overwritten in place, so that it is lost if the save fails",
                "with tempfile.TemporaryDirectory(prefix=SAVING, dir=out, ignore_cleanup_errors=True) as temporary:",
                "for temporary in [out]:",
            ),
        ],
        "test_checkpoint::test_a_run_is_resumed_with_different_inputs_only_by_force": [
            (
                "a run is resumed with other prompts, weights or rewards without an error",
                "if old.get(name) != new.get(name)]",
                "if name not in old]",
            ),
        ],
    },
    "runtime/distributed.py": {
        "test_distributed::test_a_rollout_by_two_processes_equals_that_by_one": [
            (
                "each process uses only its own episodes to whiten advantages",
                "return torch.cat(parts)",
                "return torch.cat([part] * self.size)",
            ),
        ],
        "test_distributed::test_an_update_by_two_processes_equals_that_by_one": [
            ("gradients are summed over processes, not averaged", "flat /= self.size", "pass"),
        ],
    },
    "runtime/hub.py": {
        "test_model::test_logits_are_those_of_transformers": [
            (
                "a Conv1D weight of GPT-2 is not transposed",
                '"attn.c_attn.weight", "attn.c_proj.weight", ',
                '"attn.c_attn.weight", ',
            ),
        ],
        "test_model::test_all_formats_of_names_and_files_give_the_same_weights": [
            (
                "the bias of c_attn is dropped because its name ends like that of the causal mask, attn.bias",
                'r"h\\.\\d+\\.attn\\.(bias|masked_bias)"',
                'r"h\\.\\d+\\.attn\\.(c_attn\\.)?(bias|masked_bias)"',
            ),
        ],
    },
    "data.py": {
        "test_data::test_a_part_named_test_is_the_evaluation_split_and_its_reviews_are_in_no_other_split": [
            ("a review is in two splits", "rows.keys() - evaluation.keys()", "rows.keys()"),
        ],
        "test_data::test_the_first_reviews_of_a_split_have_both_labels_although_the_file_is_sorted_by_label": [
            (
                "the first reviews of a file that is sorted by label are all negative",
                "sorted(rows.keys() - evaluation.keys())",
                "[k for k in rows if k not in evaluation]",
            ),
        ],
        "test_data::test_a_text_that_spells_the_end_of_text_token_is_encoded_as_letters": [
            (
                "the characters <|endoftext|> in a review become the special token",
                "before, backend.encode_special_tokens = backend.encode_special_tokens, True",
                "before, backend.encode_special_tokens = backend.encode_special_tokens, False",
            ),
        ],
        "test_reward::test_the_classifier_never_reads_an_end_of_text_token": [
            ("the reward model reads <|endoftext|> as text", "skip_special_tokens=True", "skip_special_tokens=False"),
        ],
    },
    "finetune_gpt2.py": {
        "test_finetune::test_a_model_trained_on_reviews_of_three_tokens_stops_after_three": [
            (
                "<|endoftext|> is ignored as padding in fine-tuning",
                'targets, reduction="sum") / y.numel()',
                'targets, reduction="sum", ignore_index=0) / y.numel()',
            ),
        ],
        "test_finetune::test_the_targets_mix_the_probabilities_of_the_teacher_and_the_next_token": [
            (
                "the next token has weight 1 besides the teacher",
                "torch.full_like(probs[:, :1], 1 - share)",
                "torch.full_like(probs[:, :1], 1)",
            ),
        ],
        "test_finetune::test_a_run_with_a_teacher_follows_it": [
            ("a run ignores its teacher", "train_step(stepper, x, y, cfg, teacher)", "train_step(stepper, x, y, cfg)"),
        ],
        "test_finetune::test_dropout_changes_the_training_loss_and_not_the_validation": [
            ("validation has dropout", "    model.eval()  # no dropout\n", ""),
            ("training after the first validation has no dropout", "    model.train(training)\n", ""),
        ],
        "test_finetune::test_a_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_bit": [
            (
                "a resumed run drops other units than an uninterrupted one",
                "            torch.manual_seed(seed_of(cfg.seed, step, ranks.rank))  # of dropout\n",
                "",
            ),
        ],
    },
    "reward.py": {
        "test_ppo::test_with_shaping_a_value_is_the_value_head_plus_the_score_of_the_text_so_far": [
            (
                "the value of a token is the score of the text that includes the token",
                "decode(ids[:, : prompt_len + t], tokenizer)",
                "decode(ids[:, : prompt_len + t + 1], tokenizer)",
            ),
        ],
        "test_linear_classifier::test_the_baseline_is_trained_on_crops_of_its_splits_only_with_their_labels": [
            (
                "the crops of the linear classifier are the same in all passes",
                "for text in training_texts(reviews.texts, i, cfg)]",
                "for text in training_texts(reviews.texts, 0, cfg)]",
            ),
        ],
        "test_reward::test_each_epoch_has_all_reviews_and_generated_texts_with_the_probabilities_of_the_teacher": [
            (
                "the generated texts are the same in all epochs",
                "generated_texts(generator, reviews.texts, epoch, cfg)",
                "generated_texts(generator, reviews.texts, 0, cfg)",
            ),
        ],
        "test_reward::test_the_order_of_the_labels_changes_no_score": [
            ("the reward is the logit of index 1, whatever its label is", "return matches[0]", "return 1"),
        ],
        "test_reward::test_of_a_long_text_the_end_is_scored": [
            (
                "a long text is truncated on the right, where the response is",
                'tokenizer.truncation_side = "left"',
                'tokenizer.truncation_side = "right"',
            ),
        ],
        "test_reward::test_a_batch_with_a_quarter_of_batch_tokens_has_only_texts_of_similar_length": [
            ("batches are a tenth padding", "(lengths[rest] >= 0.9 * longest).sum()", "len(rest)"),
        ],
        "test_reward::test_a_text_has_the_same_score_alone_and_in_any_batch_and_scores_keep_the_order_of_the_texts": [
            (
                "the reward model attends to padding",
                "self.model(**batch).logits.float()",
                'self.model(batch["input_ids"]).logits.float()',
            ),
            (
                "scores are returned in the order of length, not of the texts",
                "[torch.from_numpy(order.argsort())]",
                "",
            ),
        ],
        "test_reward::test_a_teacher_reads_the_texts_that_its_student_reads": [
            (
                "the teacher reads whole reviews, its student only parts",
                "teacher.log_odds([texts[i] for i in rows])",
                "teacher.log_odds([reviews.texts[i] for i in rows])",
            ),
        ],
    },
    "evaluate.py": {
        "test_evaluate::test_the_prompts_are_from_the_evaluation_split": [
            (
                "the evaluation uses the prompts of PPO",
                'load_prompts(cfg, "evaluation",',
                'load_prompts(cfg, "prompts",',
            ),
        ],
        "test_evaluate::test_each_metric_is_of_its_own_model_and_classifier": [
            (
                "the responses are judged by the reward that PPO has increased",
                "measure(responses[name], reward_fn, judge, cfg)",
                "measure(responses[name], reward_fn, reward_fn, cfg)",
            ),
        ],
    },
    "analysis/responses.py": {
        "test_evaluate::test_a_policy_that_is_its_own_reference_has_a_kl_of_0_and_the_same_seed_gives_the_same_texts": [
            (
                "the models before and after PPO sample with different random numbers",
                "generator = random_generator(device, cfg.seed, i)",
                "generator = None",
            ),
        ],
    },
    "analysis/metrics.py": {
        "test_metrics::test_perplexity_is_of_all_tokens_together": [
            (
                "perplexity is the mean of the perplexities of responses",
                "return jackknife(*map(np.exp, leave_one_out(nll.sum(), nll, lengths)))",
                "return np.exp(nll / lengths)",
            ),
        ],
        "test_metrics::test_the_second_model_gives_the_loss_of_transformers": [
            ("the perplexity of a response includes its prompt", "end > len(prompt) for", "end > 0 for"),
        ],
    },
    "analysis/limit.py": {
        "test_limit::test_the_curve_is_that_of_pi_star_where_all_responses_are_known": [
            (
                "the KL of pi* without the number of responses",
                "torch.xlogy(weights, n * weights)",
                "torch.xlogy(weights, weights)",
            ),
            ("pi* at 1 / beta", "(scores / beta).softmax(1)", "(scores * beta).softmax(1)"),
        ],
        "test_limit::test_few_responses_need_too_much_kl_by_the_share_that_margin_states": [
            (
                "weights are normalized over all prompts",
                "(scores / beta).softmax(1)",
                "(scores / beta).flatten().softmax(0).view_as(scores) * len(scores)",
            ),
        ],
        "test_limit::test_best_of_n_is_the_mean_of_the_highest_score_over_all_choices": [
            (
                "n are drawn with replacement",
                "math.comb(i, n - 1) / math.comb(size, n)",
                "((i + 1) ** n - i**n) / size**n",
            ),
        ],
        "test_limit::test_pi_star_has_an_efficiency_of_1_and_half_of_it_at_twice_the_kl": [
            (
                "the efficiency is the gain of the policy over that of the limit",
                "needed / float(kls.mean()),",
                "float(kls.mean()) / needed,",
            ),
        ],
        "test_limit::test_the_second_call_reads_the_scores_and_another_reference_reward_or_option_does_not": [
            (
                "all references share their responses",
                "policy_fingerprint(policy, tokenizer), *models, str(options)",
                "*models, str(options)",
            ),
        ],
    },
    "analysis/frontier_tables.py": {
        "test_frontier_tables::test_a_value_at_a_kl_needs_a_run_within_a_fifth_of_it": [
            (
                "methods are compared at a KL that none of their runs is close to",
                "<= NEAR * nats for row in runs",
                "<= 1e9 for row in runs",
            ),
        ],
        "test_frontier_tables::test_a_value_at_a_kl_is_interpolated_if_a_run_is_near": [
            (
                "scores are interpolated linearly in the KL, which is too low near 0",
                'points = sorted((row["kl_exact"] ** 0.5, row[measure])',
                'points = sorted((row["kl_exact"], row[measure])',
            ),
        ],
        "test_frontier_tables::test_a_run_beyond_the_curve_of_the_limit_has_a_lower_bound_in_the_table_of_runs": [
            (
                "a lower bound of the efficiency is shown as a value",
                'return row["score"] - start["score"] > limit[-1]["gain"]',
                "return False",
            ),
        ],
    },
    "analysis/frontier.py": {
        "test_frontier::test_the_share_positive_by_words_is_that_of_a_classifier_of_labels_that_no_other_model_saw": [
            (
                "the independent classifier is trained on the labels of the judge",
                'sentiment_baseline([splits["prompts"]]',
                'sentiment_baseline([splits["judge"]]',
            ),
        ],
        "test_frontier::test_the_score_of_the_fine_tuned_model_is_the_mean_of_all_responses_of_the_limit_and_other_"
        "measures_of_one": [
            (
                "the gains of all runs share the noise of one response per prompt",
                '"seed": 0} | row | means',
                '"seed": 0} | means | row',
            ),
        ],
    },
    "analysis/quality.py": {
        "test_quality::test_the_discriminator_is_at_chance_for_texts_of_the_same_distribution": [
            (
                "the discriminator is tested on the texts that it was trained on",
                "train = np.setdiff1d(prompts, test)",
                "train = prompts",
            ),
        ],
    },
    "runtime/passes.py": {
        "test_passes::test_updates_by_graphs_equal_updates_without": [
            (
                "gradients of a graph are not reset after a step",
                "            torch._foreach_zero_(new)\n",
                "            pass\n",
            ),
        ],
        "test_passes::test_outputs_are_not_overwritten_by_the_next_call": [
            ("outputs of a graph are not copied", "output.clone() for output", "output for output"),
        ],
        "test_passes::test_a_second_backward_pass_raises": [
            ("the activations of a graph are used twice", "        ctx.passes.latest = None\n", ""),
        ],
    },
}


def main(words):
    chosen = [
        (description, file, test, right, wrong)
        for file, tests in MISTAKES.items()
        for test, mistakes in tests.items()
        for description, right, wrong in mistakes
        if not words or any(word in description for word in words)
    ]
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in MISTAKES}
    test_files = {path.stem: path.relative_to(ROOT) for path in (ROOT / "tests").glob("**/test_*.py")}
    names = {}
    for _, _, test, _, _ in chosen:
        stem, name = test.split("::")
        names[test] = f"{test_files[stem]}::{name}"
    stale = [(description, file) for description, file, _, right, _ in chosen if sources[file].count(right) != 1]
    failures = len(stale)
    for description, file in stale:
        print(f"stale     {file:<22}  {description}")
    with Forks(2) as forks:
        for _, result in forks.run([("", {}, partial(run_pytest, sorted(names.values())))]):
            if result.verdict != "passed":
                sys.exit(f"error: without any mistake {result.stored}: {result.verdict}\n{result.output[-4000:]}")
        tasks = (
            ((description, file), {file: sources[file].replace(right, wrong)}, partial(run_pytest, [names[test]]))
            for description, file, test, right, wrong in chosen
            if (description, file) not in stale
        )
        for (description, file), result in forks.run(tasks):
            verdict = {"passed": "survived", "no tests": "stale"}.get(result.verdict, "caught")
            failures += verdict != "caught"
            print(f"{verdict:<8}  {file:<22}  {description}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mistakes caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
