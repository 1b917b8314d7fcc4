"""One-line wrong versions of the source, and for each the test that must go red: a suite that no wrong PPO survives.

    make mutants                            # all of them, a few minutes
    python tests/mutants.py "score at" kl   # those whose name holds one of the words

Each line is replaced in a copy of the tree, where its one test is run. A mutant survives where that test stays green;
it is stale where the line is no longer there exactly once. Either makes the exit status 1. A test that does not end
is not green: its mutant is caught.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS, LIMIT = 2, 600  # pytests at a time, each on one thread; seconds that one may take: it needs ten, all 40
FORKS = multiprocessing.get_context("forkserver")  # torch and transformers are imported once, not once a mutant
FORKS.set_forkserver_preload(
    ["pytest", "hypothesis", "tyro", "datasets", "transformers.models.bert.modeling_bert"]
    + ["transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto"]
)


MUTANTS = {  # file: {test that goes red: [(the mistake, the right line or a part of it, the wrong one), ...]}
    "ppo.py": {
        "test_ppo::test_rloo_gives_the_golden_numbers": [
            ("a baseline that a response is part of", "/ (cfg.samples_per_prompt - 1)", "/ cfg.samples_per_prompt"),
            (
                "a group of every k-th response",
                "groups = rewards.view(-1, cfg.samples_per_prompt)",
                "groups = rewards.view(cfg.samples_per_prompt, -1).T",
            ),
        ],
        "test_ppo::test_grpo_gives_the_golden_numbers": [
            ("GRPO with the variance", "groups.std(1, keepdim=True)", "groups.var(1, keepdim=True)"),
            ("GRPO over all prompts", "groups.std(1, keepdim=True)", "groups.std()"),
        ],
        "test_ppo::test_a_pass_that_is_not_finite_is_told_from_the_reference_s": [
            ("values of nan go on", "(logprobs + values).where", "logprobs.where"),
        ],
        "test_ppo::test_every_token_of_a_response_has_the_advantage_of_its_whole_reward": [
            (
                "RLOO and GRPO without the KL",
                "group_advantages(rewards.sum(1), cfg)",
                "group_advantages(scores.to(kl.dtype), cfg)",
            ),
        ],
        "test_ppo::test_without_gae_the_value_head_learns_nothing": [
            (
                "a value loss without gae",
                'vf_coef = cfg.vf_coef if cfg.advantage == "gae" else 0.0',
                "vf_coef = cfg.vf_coef",
            ),
        ],
        "test_learning::test_kl_alone_pulls_the_policy_back_to_its_reference": [
            ("KL is paid for, not charged", "(-kl_coef * kl).where", "(kl_coef * kl).where"),
        ],
        "test_learning::test_policy_reaches_the_optimum_of_its_objective": [
            ("KL counted twice", "(-kl_coef * kl).where", "(-2 * kl_coef * kl).where"),
            (
                "k3 in the reward",
                "kl = (logprobs - ref_logprobs).where",
                "kl = ((ref_logprobs - logprobs).exp() - 1 + logprobs - ref_logprobs).where",
            ),
        ],
        "test_ppo::test_return_of_a_response_is_its_score_less_beta_times_k1": [
            (
                "|KL| in the reward",
                "kl = (logprobs - ref_logprobs).where",
                "kl = (logprobs - ref_logprobs).abs().where",
            ),
        ],
        "test_ppo::test_nan_after_the_end_reaches_no_number_of_a_rollout": [
            ("nan after the end is not finite", "(logprobs + values).where(mask, 0)", "(logprobs + values)"),
            ("nan of the reference is not finite", "ref_logprobs.where(mask, 0).sum", "ref_logprobs.sum"),
            (
                "nan after the end in the KL",
                "kl = (logprobs - ref_logprobs).where(mask, 0)",
                "kl = logprobs - ref_logprobs",
            ),
        ],
        "test_ppo::test_nan_after_the_end_reaches_no_number": [
            ("nan after the end in the rewards", "(-kl_coef * kl).where(mask, 0)", "(-kl_coef * kl * mask)"),
            ("nan after the end in one whitened token", "return x.where(mask, 0)", "return x * mask"),
        ],
        "test_ppo::test_mask_keeps_the_first_eos_and_nothing_after_it": [
            ("mask that leaves <|endoftext|> out", "return is_eos.cumsum(1) - is_eos.long() == 0", "return ~is_eos"),
        ],
        "test_learning::test_policy_learns_to_end_its_response": [
            (
                "ending a response has no gradient",
                "return is_eos.cumsum(1) - is_eos.long() == 0",
                "return is_eos.cumsum(1) == 0",
            ),
        ],
        "test_ppo::test_score_lands_on_the_last_real_token_and_kl_on_every_one": [
            (
                "score at the last column",
                "last = mask.sum(1, keepdim=True) - 1",
                "last = torch.full_like(mask[:, :1].long(), mask.shape[1] - 1)",
            ),
            (
                "score on the first token",
                "last = mask.sum(1, keepdim=True) - 1",
                "last = mask.sum(1, keepdim=True) * 0",
            ),
            (
                "score times the coefficient",
                "scatter_add(1, last, scores[:, None])",
                "scatter_add(1, last, kl_coef * scores[:, None])",
            ),
        ],
        "test_ppo::test_gae_gives_the_golden_numbers": [
            (
                "values behind the end in GAE",
                "rewards, values = rewards.where(mask, 0), values.where(mask, 0)",
                "rewards = rewards.where(mask, 0)",
            ),
            ("lambda left out of GAE", "delta + gamma * lam * advantage", "delta + gamma * advantage"),
        ],
        "test_ppo::test_gae_with_lambda_0_is_the_td_error": [
            (
                "GAE with the value of this token as the next one's",
                "delta = rewards[:, t] + gamma * next_value - values[:, t]",
                "delta = rewards[:, t] + gamma * values[:, t] - values[:, t]",
            ),
            ("discount left out of the TD error", "gamma * next_value", "next_value"),
        ],
        "test_ppo::test_whitening_counts_the_real_tokens_of_the_whole_rollout": [
            ("whitening counts what lies behind the end", "real = x[mask]  # (N,)", "real = x.flatten()"),
            ("population variance", "real.mean(), real.std()", "real.mean(), real.std(unbiased=False)"),
        ],
        "test_ppo::test_whitening_rewards_keeps_their_mean_and_zeroes_what_is_outside": [
            (
                "whitened but not masked again",
                "return (whitened if shift_mean else whitened + mean).where(mask, 0)",
                "return whitened if shift_mean else whitened + mean",
            ),
        ],
        "test_ppo::test_whitening_one_token_or_equal_ones_stays_finite": [
            ("one token is whitened to nan", "if len(real) < 2:", "if len(real) < 1:"),
        ],
        "test_ppo::test_rollout_whitens_the_advantages_once_and_leaves_the_returns_alone": [
            (
                "whitening reward by reward subtracts the mean",
                "rewards = whiten(rewards, mask, shift_mean=False)",
                "rewards = whiten(rewards, mask)",
            ),
            (
                "each response is whitened by itself",
                "advantages = whiten(advantages, mask)  # over",
                "advantages = torch.cat([whiten(a[None], m[None]) for a, m in zip(advantages, mask)])  # over",
            ),
            (
                "returns from whitened advantages",
                "advantages = whiten(advantages, mask)  # over",
                "advantages = whiten(advantages, mask); returns = advantages + values  # over",
            ),
        ],
        "test_ppo::test_nothing_in_a_rollout_carries_a_gradient": [
            ("the rollout carries gradients", "@torch.no_grad()\ndef rollout(", "def rollout("),
        ],
        "test_compile::test_all_lengths_of_prompts_and_responses_share_three_graphs": [
            ("a graph for each length of the policy", "    policy.compile(dynamic=True)", "    policy.compile()"),
            ("a graph for each length of the reference", "ref_policy.compile(dynamic=True)", "ref_policy.compile()"),
        ],
        "test_compile::test_a_compiled_rollout_keeps_the_gradient_graph_of_one_micro_batch_at_a_time": [
            ("a compiled rollout keeps all gradient graphs", "[x.detach() for x in policy(", "[x for x in policy("),
        ],
        "test_compile::test_the_first_ratio_is_1_when_every_graph_rounds_differently": [
            ("a compiled rollout without gradients", "torch.set_grad_enabled(cfg.compile)", "torch.no_grad()"),
            ("a compiled rollout on views", "[part.clone() for part in", "[part for part in"),
        ],
        "test_ppo::test_clip_is_for_the_score_and_not_for_the_kl": [
            (
                "the score clip cuts the KL too",
                "rewards = token_rewards(penalised.to(kl.dtype), kl, mask, kl_coef)",
                "rewards = token_rewards(penalised.to(kl.dtype), kl, mask, kl_coef).clamp(-5, 5)",
            ),
        ],
        "test_ppo::test_penalty_is_for_a_response_without_eos_whatever_the_prompt_holds": [
            (
                "<|endoftext|> looked for in the prompt too",
                "ended = (sequences[:, prompt_len:] == eos_id).any(1)",
                "ended = (sequences == eos_id).any(1)",
            ),
        ],
        "test_reward::test_the_classifier_never_reads_an_end_of_text_token": [
            (
                "the reward reads <|endoftext|> as words",
                "skip_special_tokens=True, clean_up_tokenization_spaces=False)\n    scores",
                "skip_special_tokens=False, clean_up_tokenization_spaces=False)\n    scores",
            ),
        ],
        "test_reward::test_a_letter_split_between_prompt_and_response_reaches_the_classifier_whole": [
            (
                "prompt and response decoded apart",
                "tokenizer.batch_decode(sequences, skip_special_tokens=True,",
                "[a + b for a, b in zip(*map(tokenizer.batch_decode, (prompts, sequences[:, prompt_len:-1])))]; dict(",
            ),
        ],
        "test_ppo::test_clipped_surrogate_is_pessimistic_on_both_sides": [
            (
                "clipped from above only",
                "ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)",
                "ratio.clamp(max=1 + cfg.clip_eps)",
            ),
            (
                "the optimistic surrogate",
                "torch.max(-advantages * ratio, -advantages * clipped)",
                "torch.min(-advantages * ratio, -advantages * clipped)",
            ),
        ],
        "test_ppo::test_first_gradient_is_the_vanilla_policy_gradient": [
            ("ratio upside down", "log_ratio = logprobs - old_logprobs", "log_ratio = old_logprobs - logprobs"),
        ],
        "test_ppo::test_loss_and_gradient_stay_finite_at_absurd_ratios": [
            ("absurd ratios overflow", "log_ratio.clamp(-20, 20).exp()", "log_ratio.exp()"),
        ],
        "test_ppo::test_value_loss_clips_around_the_old_value_and_takes_the_larger_error": [
            (
                "the optimistic value loss",
                "0.5 * torch.max(vf_errors, vf_errors_clipped)",
                "0.5 * torch.min(vf_errors, vf_errors_clipped)",
            ),
            (
                "the half of the value loss is missing",
                "0.5 * torch.max(vf_errors, vf_errors_clipped)",
                "torch.max(vf_errors, vf_errors_clipped)",
            ),
            (
                "value clipped around the return",
                "near_old = old_values + (values - old_values).clamp",
                "near_old = returns + (values - returns).clamp",
            ),
            (
                "vf_coef twice",
                "return pg_loss + vf_coef * vf_loss, {",
                "return pg_loss + vf_coef**2 * vf_loss, {",
            ),
        ],
        "test_ppo::test_approx_kl_is_k3_of_the_old_policy_from_the_new": [
            (
                "approx_kl of the other direction",
                "(ratio - 1 - log_ratio).mean()",
                "(1 / ratio - 1 + log_ratio).mean()",
            ),
        ],
        "test_ppo::test_controller_moves_the_coefficient_at_most_a_fifth_of_its_horizon": [
            (
                "controller without its clip",
                "error = min(max(kl / self.target - 1, -0.2), 0.2)",
                "error = kl / self.target - 1",
            ),
            ("controller the wrong way", "self.coef *= 1 + error", "self.coef *= 1 - error"),
        ],
        "test_ppo::test_coefficient_moves_once_a_rollout_by_that_rollouts_kl": [
            (
                "controller moves once an epoch",
                'controller.update(metrics["kl"], cfg.batch_size)',
                '[controller.update(metrics["kl"], cfg.batch_size) for _ in range(cfg.ppo_epochs)]',
            ),
        ],
        "test_ppo::test_micro_batch_size_does_not_change_the_step": [
            ("mean of the micro-batches' means", "share = mask.sum() / tokens", "share = len(micro) / len(rows)"),
            ("the sum of the micro-batches' means", "(loss * share).backward()", "loss.backward()"),
        ],
        "test_ppo::test_every_minibatch_of_every_epoch_takes_one_step": [
            ("one optimizer step an epoch", ".split(cfg.minibatch_size):", ".split(cfg.batch_size):"),
        ],
        "test_ppo::test_every_real_token_is_used_once_an_epoch_in_a_new_order": [
            (
                "the same order in every epoch",
                "order = torch.randperm(len(batch.mask), generator=generator)",
                "order = torch.arange(len(batch.mask))",
            ),
            (
                "episodes drawn with replacement",
                "order = torch.randperm(len(batch.mask), generator=generator)",
                "order = torch.randint(len(batch.mask), (len(batch.mask),), generator=generator)",
            ),
        ],
        "test_ppo::test_without_a_step_every_ratio_is_1_in_every_epoch": [
            (
                "the temperature left out of the update",
                "policy(batch.sequences[micro], batch.prompt_len, cfg.temperature)",
                "policy(batch.sequences[micro], batch.prompt_len)",
            ),
        ],
        "test_ppo::test_logprobs_and_values_belong_to_the_state_before_their_token": [
            (
                "the temperature left out of the reference",
                "ref_policy(part, prompt_len, cfg.temperature)[0]",
                "ref_policy(part, prompt_len)[0]",
            ),
        ],
        "test_ppo::test_optimizer_is_adam_without_weight_decay_over_the_policy_alone": [
            ("weight decay in PPO", "torch.optim.Adam(policy", "torch.optim.AdamW(policy"),
        ],
        "test_ppo::test_reference_stays_what_the_policy_was": [
            ("the reference is the policy", "copy.deepcopy(policy).eval().requires_grad_(False)", "policy"),
        ],
        "test_ppo::test_every_rollout_draws_its_own_random_numbers": [
            (
                "the same random numbers in every rollout",
                "random_generator(device, cfg.seed, step, ranks.rank)",
                "random_generator(device, cfg.seed)",
            ),
        ],
        "test_ppo::test_learning_rate_falls_linearly_to_0_behind_the_last_rollout": [
            (
                "learning rate that never falls",
                "stepper.set_lr(1 - (1 - cfg.lr_end) * step / cfg.steps)",
                "stepper.set_lr(1.0)",
            ),
        ],
        "test_properties::test_gae_is_the_discounted_sum_of_the_td_errors_to_come": [
            ("no discount between TD errors", "delta + gamma * lam * advantage", "delta + lam * advantage"),
        ],
        "test_properties::test_no_function_of_the_arithmetic_changes_what_it_is_given": [
            (
                "whitening changes its input",
                "whitened = (x - mean) / (std + 1e-8)",
                "whitened = x.sub_(mean).div_(std + 1e-8)",
            ),
        ],
        "test_ppo::test_prompts_of_a_run_begin_no_review_that_is_held_out_or_was_learned_from": [
            ("prompts of the evaluation split", '["prompts"]', '["evaluation"]'),
        ],
        "test_resume::test_ppo_that_broke_in_its_second_pass_over_the_prompts_goes_on_exactly": [
            (
                "the KL coefficient begins anew after a kill",
                'AdaptiveKL(state["kl_coef"], ',
                "AdaptiveKL(cfg.kl_coef, ",
            ),
            (
                "random numbers counted from where a run goes on",
                "random_generator(device, cfg.seed, step, ranks.rank)",
                "random_generator(device, cfg.seed, step - checkpoints.first_step, ranks.rank)",
            ),
        ],
        "test_distributed::test_processes_share_out_the_prompts_and_draw_other_answers": [
            (
                "the same random numbers on all ranks",
                "random_generator(device, cfg.seed, step, ranks.rank)",
                "random_generator(device, cfg.seed, step)",
            ),
        ],
        "test_distributed::test_two_processes_take_the_steps_of_one": [
            (
                "tokens of all processes, gradients' mean",
                "batch.mask[rows].sum() / ranks.size",
                "batch.mask[rows].sum()",
            ),
        ],
        "test_guards::test_an_alarm_that_stops_a_run_leaves_its_best_policy": [
            ("the last policy instead of the best", 'policy = load_policy(*open_gpt2(f"{cfg.out}/{BEST}"))', "pass"),
        ],
    },
    "optimizer.py": {
        "test_ppo::test_a_minibatch_leaves_no_gradient_to_the_next": [
            ("gradients of the last minibatch stay", "self.model.zero_grad(set_to_none=True)", "pass"),
        ],
        "test_optimizer::test_every_group_of_every_optimizer_follows_the_schedule_from_its_own_peak": [
            (
                "learning rate of the first group only",
                "zip(optimizer.param_groups, peaks):",
                "zip(optimizer.param_groups[:1], peaks):",
            ),
        ],
        "test_optimizer::test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted": [
            ("a gradient that is not finite is stepped with", "if math.isfinite(norm):", "if True:"),
        ],
        "test_ppo::test_gradient_is_clipped_once_a_step": [
            (
                "no gradient clipping",
                "clip_grad_norm_(self.model.parameters(), self.grad_clip)",
                "clip_grad_norm_(self.model.parameters(), math.inf)",
            ),
        ],
        "test_optimizer::test_weight_decay_takes_matrices_and_leaves_biases_and_gains": [
            (
                "biases and gains decay too",
                'p.dim() < 2], "weight_decay": 0.0',
                'p.dim() < 2], "weight_decay": weight_decay',
            ),
        ],
    },
    "bench.py": {
        "test_bench::test_compiled_passes_are_timed_and_their_flops_are_those_of_eager_ones": [
            ("--compile compiles nothing", "if cfg.compile:", "if False:"),
        ],
    },
    "device.py": {
        "test_device::test_the_first_exp_of_a_run_is_a_single_number": [
            ("MKL's first exp by several threads", "torch.zeros(1).exp()", "pass"),
        ],
        "test_device::test_the_process_with_the_least_memory_decides": [
            ("each process has its own micro-batch", "return rows - ranks.any(rows - size)", "return size"),
        ],
        "test_device::test_the_micro_batch_is_the_largest_divisor_that_the_memory_of_a_gpu_holds": [
            ("no room for Adam and the reference", "- 4 * copies * weights", ""),
        ],
    },
    "model.py": {
        "test_model::test_the_linear_layers_of_a_decoding_step_are_linear_layers": [
            ("a bias that is added in another order", "bias.view(-1, 1, block)", "bias.view(block, 1, -1).mT"),
            ("decoding without biases", "torch.addmm(bias[:, None], weight, rows.T)", "weight @ rows.T"),
            ("blocks that take the place of rows", "product.transpose(0, 1).reshape(", "product.reshape("),
        ],
        "test_model::test_a_static_step_gives_the_logits_of_a_full_forward": [
            ("a static step that does not see itself", "self.places <= self.position", "self.places < self.position"),
            ("a static step that sees what is to come", "self.places <= self.position", "self.places >= 0"),
            ("a static step that stands still", "cache.position += 1", "cache.position += 0"),
        ],
        "test_model::test_the_compiled_decoding_step_writes_the_same_and_is_traced_once": [
            (
                "what the prompt left in the cache is lost",
                "self.position.fill_(cache.filled)",
                "self.position.fill_(0)",
            ),
        ],
        "test_compile::test_all_lengths_of_prompts_and_responses_share_three_graphs": [
            ("a symbol as is_causal", "causal = cache is None or L > 1", "causal = L > 1"),
        ],
        "test_compile::test_a_decoding_step_copies_no_more_than_the_keys_of_one_layer": [
            (
                "one buffer for the keys and values of all layers",
                'return getattr(self, f"keys{layer}"), getattr(self, f"values{layer}")',
                "if not hasattr(self, 'all'):\n"
                "            self.register_buffer('all', torch.stack([self.keys0] * 2 * self.n_layer))\n"
                "        return self.all[2 * layer], self.all[2 * layer + 1]",
            ),
        ],
        "test_compile::test_nan_left_in_the_static_cache_reaches_no_later_response": [
            ("nan stays in the static cache", "ours[:, :, cache.filled :] = 0", "pass"),
        ],
        "test_model::test_a_stream_yields_a_step_at_a_time_what_generate_returns": [
            ("generation with gradients", "    @torch.no_grad()\n    def stream(", "    def stream("),
        ],
        "test_model::test_decoding_stops_soon_after_every_row_has_ended": [
            ("generation goes on when all have ended", "if step % STOP_CHECK == 0 and ended.all():", "if False:"),
        ],
        "test_model::test_generate_samples_from_the_distribution_that_the_policy_reports": [
            (
                "temperature in sampling only",
                "logits = self.gpt2.logits(hidden) / temperature  # (B, T, V)",
                "logits = self.gpt2.logits(hidden)",
            ),
        ],
        "test_model::test_samples_follow_softmax_of_the_logits_over_the_temperature": [
            (
                "no temperature in sampling",
                "new = draw(logits / temperature, generator)",
                "new = draw(logits, generator)",
            ),
            (
                "greedy decoding",
                "torch.searchsorted(cumulated, (1 - u) * cumulated[:, -1:]).squeeze(-1)",
                "logits.argmax(-1)",
            ),
        ],
        "test_model::test_the_self_check_refuses_a_temperature_in_the_cached_pass_alone": [
            ("the self-check at temperature 1", "prompts.shape[1], cfg.temperature", "prompts.shape[1], 1.0"),
        ],
        "test_model::test_the_self_check_bounds_the_largest_and_the_mean_error": [
            (
                "a self-check of the maximum alone",
                "largest <= allowed[0] and mean <= allowed[1]",
                "largest <= allowed[0]",
            ),
            ("a self-check of the mean alone", "largest <= allowed[0] and mean <= allowed[1]", "mean <= allowed[1]"),
        ],
        "test_model::test_the_self_check_tells_typical_mistakes_from_rounding": [
            ("a self-check that takes mistakes for rounding", "True: (1.0, 0.05)", "True: (10.0, 0.5)"),
        ],
        "test_model::test_a_draw_is_never_a_token_without_probability": [
            ("a uniform number of 0 draws the first token", "(1 - u) * cumulated", "u * cumulated"),
        ],
        "test_model::test_tokens_below_the_rounding_of_float32_are_all_drawn": [
            (
                "probabilities summed up in float32",
                'dtype=torch.float32 if logits.device.type == "mps" else torch.float64',
                "dtype=torch.float32",
            ),
        ],
        "test_model::test_the_gradient_of_log_probabilities_is_that_of_log_softmax": [
            ("gradient of a log-probability without its softmax", "probs.mul_(-grad)", "probs.mul_(0 * grad)"),
            ("gradient of the softmax with the wrong sign", "probs.mul_(-grad)", "probs.mul_(grad)"),
        ],
        "test_ppo::test_without_a_step_every_ratio_is_1_in_every_epoch": [
            (
                "dropout while it learns",
                'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
                'return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), 0.1, self.training)',
            ),
        ],
        "test_model::test_a_logprob_is_read_from_the_logits_of_the_position_before_its_token": [
            (
                "log-probabilities one position late",
                "hidden = self.gpt2.trunk(sequences[:, :-1])",
                "hidden = self.gpt2.trunk(sequences[:, 1:])",
            ),
        ],
        "test_model::test_a_value_is_read_from_the_hidden_state_before_its_token": [
            (
                "values one position late",
                "values = self.value_head(hidden.to",
                "values = self.value_head(hidden.roll(-1, 1).to",
            ),
        ],
        "test_model::test_a_cached_decode_step_gives_the_logits_of_a_full_forward": [
            ("positions that start anew in decoding", "slice(seen, end)", "slice(end - seen)"),
            ("causal mask on a cached step", "causal = cache is None or L > 1", "causal = True"),
            ("a full cache is not moved on", "cache.filled = end", "cache.filled = seen + 1"),
        ],
        "test_model::test_a_later_token_changes_no_earlier_logit": [
            ("no causal mask", "causal = cache is None or L > 1", "causal = False"),
        ],
        "test_model::test_bf16_rounds_the_trunk_and_never_the_logits": [
            (
                "logits in bf16",
                "return linear(hidden.to(weight.dtype), weight)",
                "return linear(hidden.bfloat16(), weight.bfloat16()).to(weight.dtype)",
            ),
        ],
        "test_model::test_logits_are_those_of_transformers": [
            ("GELU by the error function", 'approximate="tanh"', 'approximate="none"'),
            (
                "epsilon of BERT's LayerNorm",
                "self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)",
                "self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-12)",
            ),
        ],
        "test_model::test_gradients_are_those_of_transformers": [
            (
                "no gradient through the LM head",
                "return linear(hidden.to(weight.dtype), weight)",
                "return linear(hidden.to(weight.dtype), weight.detach())",
            ),
        ],
        "test_model::test_rows_of_the_embedding_beyond_the_tokenizer_have_no_logit_and_are_never_sampled": [
            ("rows beyond the tokenizer can be sampled", "weight = weight[: self.n_tokens]", "pass"),
        ],
        "test_model::test_a_row_holds_nothing_but_eos_behind_its_first_eos_and_all_it_drew_before": [
            ("rows go on after their end", "new = torch.where(ended, eos_id, new)", "pass"),
        ],
        "test_model::test_values_are_zero_before_training": [
            ("the value head starts at random", "nn.init.zeros_(self.value_head.weight)", "pass"),
        ],
        "test_model::test_exact_kl_is_the_sum_over_the_vocabulary_and_the_real_tokens": [
            (
                "exact KL of the other direction",
                "(logp.exp() * (logp - ref_logp)).sum(-1)",
                "(ref_logp.exp() * (ref_logp - logp)).sum(-1)",
            ),
        ],
    },
    "hub.py": {
        "test_generate::test_two_models_need_one_vocabulary": [
            ("models of other words compared", "if tokenizer.get_vocab() != after_tokenizer.get_vocab():", "if False:"),
        ],
        "test_model::test_logits_are_those_of_transformers": [
            ("attn.c_proj is not transposed", '"attn.c_attn.weight", "attn.c_proj.weight", ', '"attn.c_attn.weight", '),
        ],
        "test_model::test_every_style_of_key_and_file_gives_the_same_weights": [
            (
                "the biases of c_attn are taken for masks",
                'r"h\\.\\d+\\.attn\\.(bias|masked_bias)"',
                'r"h\\.\\d+\\.attn\\.(c_attn\\.)?(bias|masked_bias)"',
            ),
        ],
        "test_model::test_a_config_that_asks_for_other_arithmetic_is_refused": [
            ("other arithmetic in config.json is ignored", "if found not in supported:", "if False:"),
        ],
    },
    "checkpoint.py": {
        "test_model::test_weights_that_do_not_fit_are_refused_by_name": [
            (
                "a missing tensor is not noticed",
                'problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in shapes]',
                "problems = []",
            ),
        ],
        "test_finetune::test_a_run_that_was_killed_and_goes_on_equals_the_unbroken_one_to_the_bit": [
            ("the optimizer is not restored", 'optimizer.load_state_dict({"state": found,', 'dict({"state": found,'),
        ],
        "test_checkpoint::test_a_save_that_fails_leaves_the_old_files_and_no_temporary_ones": [
            (
                "saved in place",
                "    with new_folder(out, tensors) as temporary:\n        yield",
                "    for temporary in [Path(out)]:\n        yield",
            ),
        ],
        "test_checkpoint::test_a_checkpoint_that_is_not_whole_is_not_where_one_is_looked_for": [
            (
                "a checkpoint written in place",
                "        folder = temporary / name\n",
                "        folder = parent / name\n",
            ),
        ],
        "test_resume::test_a_checkpoint_that_is_damaged_is_refused_with_the_file": [
            ("checksums are not looked at", "    check_sums(folder)\n    state", "    state"),
        ],
        "test_resume::test_a_signal_ends_a_run_behind_its_step_with_a_checkpoint_of_it": [
            (
                "no checkpoint before a signal ends the run",
                "(asked or step % self.cfg.save_every == 0)",
                "(step % self.cfg.save_every == 0)",
            ),
        ],
        "test_guards::test_a_weight_that_is_no_number_is_never_saved": [
            ("weights that are not finite are saved", "if not tensor.isfinite().all()]", "if False]"),
        ],
    },
    "distributed.py": {
        "test_distributed::test_two_processes_take_the_steps_of_one": [
            ("gradients are not exchanged", "return DistributedDataParallel(model)", "return model"),
        ],
        "test_distributed::test_a_rollout_of_two_processes_is_what_one_finds_for_all_its_episodes": [
            ("advantages whitened by each process", "return torch.cat(parts)", "return torch.cat([part] * self.size)"),
        ],
        "test_distributed::test_processes_exchange_gradients_once_an_optimizer_step": [
            (
                "gradients exchanged by every micro-batch",
                "return nullcontext() if last else learner.no_sync()",
                "return nullcontext()",
            ),
        ],
    },
    "data.py": {
        "test_data::test_the_responses_to_a_prompt_stand_one_behind_the_other_for_rloo_and_grpo": [
            ("the rows of a prompt are far apart", ".repeat_interleave(k, 0)", ".repeat(k, 1)"),
        ],
        "test_data::test_a_model_of_positive_reviews_learns_from_no_other": [
            ("negative reviews for positive ones", 'reviews == "all" or label == 1', 'reviews == "all" or label == 0'),
        ],
        "test_data::test_a_controlled_prompt_is_a_control_and_the_beginning_of_a_review": [
            ("one control for all prompts", "for control in controls]", "for control in controls[:1] * 2]"),
        ],
        "test_data::test_a_part_named_test_is_the_evaluation_split_and_its_reviews_are_nowhere_else": [
            ("a review in two splits", "rows = _unique(train, evaluation)", "rows = _unique(train, ())"),
        ],
        "test_data::test_the_first_reviews_of_a_split_have_both_labels_although_the_file_is_sorted_by_label": [
            ("splits in the order of the file", "sorted(rows, key=lambda row: key(row[0]))", "list(rows)"),
        ],
        "test_data::test_the_packed_stream_is_the_reviews_with_one_end_of_text_after_each": [
            (
                "no <|endoftext|> between reviews",
                "np.array(ids + eos, dtype=np.int32)",
                "np.array(ids, dtype=np.int32)",
            ),
        ],
        "test_data::test_a_text_that_spells_the_end_of_text_gets_letters_and_comes_back_whole": [
            (
                "a text can spell the special token",
                "before, backend.encode_special_tokens = backend.encode_special_tokens, True",
                "before, backend.encode_special_tokens = backend.encode_special_tokens, False",
            ),
        ],
        "test_finetune::test_an_epoch_takes_every_block_once_in_an_order_that_epoch_and_seed_change": [
            (
                "blocks drawn with replacement",
                "np.random.default_rng([seed, epoch]).permutation(n_blocks)",
                "np.random.default_rng([seed, epoch]).integers(0, n_blocks, n_blocks)",
            ),
        ],
        "test_data::test_a_pass_over_the_pool_gives_each_prompt_at_most_once_and_the_next_pass_another_order": [
            (
                "prompts in the same order in every pass",
                "np.random.default_rng([cfg.seed, 0, passes])",
                "np.random.default_rng([cfg.seed, 0])",
            ),
        ],
    },
    "finetune_gpt2.py": {
        "test_finetune::test_a_model_of_reviews_of_three_tokens_learns_to_stop_after_three": [
            (
                "<|endoftext|> is no target",
                'ys.flatten(), reduction="sum") / y.numel()',
                'ys.flatten(), reduction="sum", ignore_index=0) / y.numel()',
            ),
        ],
        "test_finetune::test_a_target_is_the_next_token_and_the_end_of_text_is_one": [
            (
                "a token's target is the token itself",
                "torch.from_numpy(stream[at + 1]).long()",
                "torch.from_numpy(stream[at]).long()",
            ),
        ],
        "test_finetune::test_the_micro_batch_size_changes_no_gradient": [
            (
                "mean of the micro-batches' means in fine-tuning",
                'reduction="sum") / y.numel()',
                'reduction="mean") / len(y.split(cfg.micro_batch_size))',
            ),
        ],
        "test_finetune::test_the_learning_rate_warms_up_linearly_and_ends_at_min_lr": [
            (
                "learning rate 0 at the first step",
                "return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)",
                "return cfg.lr * step / cfg.warmup_steps",
            ),
        ],
        "test_compile::test_validation_and_training_share_few_graphs": [
            ("a graph for each length in fine-tuning", "model.compile(dynamic=True)", "model.compile()"),
        ],
        "test_finetune::test_validation_is_the_perplexity_worked_out_token_by_token": [
            ("the rest of the validation stream is dropped", "    if whole < len(stream):", "    if False:"),
        ],
        "test_finetune::test_a_run_takes_its_steps_with_the_constants_of_its_config": [
            ("AdamW's own betas", "(cfg.beta1, cfg.beta2), ", "(0.9, 0.999), "),
        ],
    },
    "reward.py": {
        "test_reward::test_behind_a_control_the_wanted_label_is_scored_and_the_control_is_not_read": [
            ("the control is read", "[text[len(control) :] for text", "[text for text"),
            ("[negative] asks for positive texts", "control == CONTROLS[0]", "control == CONTROLS[1]"),
        ],
        "test_reward::test_a_batch_has_so_many_tokens_with_its_padding_and_texts_of_like_length": [
            ("all texts in one batch", "max(1, self.batch_tokens // lengths[order[0]])", "len(order)"),
            ("short texts first", "order = np.argsort(-lengths", "order = np.argsort(lengths"),
        ],
        "test_reward::test_the_order_of_the_labels_changes_no_score": [
            ("the reward is a fixed index", "return found[0]", "return 1"),
        ],
        "test_reward::test_of_a_long_text_the_end_is_scored": [
            ("a long text loses its end", 'tokenizer.truncation_side = "left"', 'tokenizer.truncation_side = "right"'),
        ],
        "test_reward::test_a_text_has_the_same_score_alone_and_in_any_batch_and_scores_keep_the_order_of_the_texts": [
            (
                "no attention mask in scoring",
                "self.model(**batch).logits.float()",
                'self.model(batch["input_ids"]).logits.float()',
            ),
            ("scores in the order of length", "        return scores\n", "        return scores[order]\n"),
        ],
        "test_reward::test_the_log_odds_of_three_classes_set_the_positive_one_against_the_sum_of_the_others": [
            ("the others' mean in the log-odds", "others.logsumexp(1)", "others.mean(1)"),
        ],
        "test_resume::test_reward_goes_on_after_kill_9_in_its_second_epoch_as_if_nothing_had_been": [
            (
                "dropout goes on from the start's random numbers",
                "torch.manual_seed(seed_of(seed, step))  # of dropout",
                "pass",
            ),
        ],
    },
    "log.py": {
        "test_ppo::test_metrics_sum_kl_over_a_response_and_average_over_responses": [
            (
                "KL as a mean over tokens in the log",
                "kl = batch.kl.where(mask, 0)",
                "kl = batch.kl.where(mask, 0) / mask.sum(1, keepdim=True)",
            ),
            (
                "entropy counts what lies behind the end",
                '"entropy": -batch.logprobs[mask].mean()',
                '"entropy": -batch.logprobs.mean()',
            ),
        ],
        "test_guards::test_the_alarm_goes_off_when_the_judge_falls_while_the_score_rises": [
            ("an alarm when both rise", "if score > 2 and judge < -2:", "if score > 2:"),
        ],
    },
    "generate.py": {
        "test_generate::test_the_same_prompt_and_seed_have_the_same_answer_and_another_seed_another": [
            ("an answer drawn without the seed", "generator = random_generator(device, cfg.seed)", "generator = None"),
        ],
        "test_generate::test_a_model_that_ends_first_waits_and_none_goes_on_behind_its_end": [
            (
                "the shorter answer ends both",
                "itertools.zip_longest(*streams, fillvalue=nothing)",
                "zip(*streams)",
            ),
        ],
        "test_generate::test_prompt_and_response_are_scored_as_one_text": [
            ("an answer scored without its prompt", "[prompt + text for text in responses]", "responses"),
        ],
        "test_generate::test_a_terminal_shows_every_token_as_it_comes": [
            ("a terminal waits for the whole answer", "if live:", "if False:"),
        ],
        "test_generate::test_an_answer_that_is_higher_than_the_terminal_is_whole_in_the_end": [
            ("lines painted out of sight", "[-room:]", ""),
        ],
        "test_generate::test_nothing_that_a_model_writes_moves_the_cursor": [
            (
                "generated text as control characters while it grows",
                'printable(text.rstrip("\\ufffd"))',
                'text.rstrip("\\ufffd")',
            ),
            ("generated text as control characters in the end", "map(printable, responses)", "responses"),
        ],
        "test_generate::test_a_letter_that_comes_in_several_tokens_is_shown_when_it_is_whole": [
            ("letters shown before they are whole", '.rstrip("\\ufffd")', ""),
        ],
        "test_generate::test_the_longest_prompt_leaves_room_for_the_response": [
            (
                "the longest prompt refused",
                "cfg.response_len > config.n_positions",
                "cfg.response_len >= config.n_positions",
            ),
        ],
    },
    "evaluate.py": {
        "test_evaluate::test_a_policy_that_is_its_own_reference_has_no_kl_and_the_same_seed_gives_the_same_texts": [
            (
                "the models get other random numbers",
                "generator = random_generator(device, cfg.seed, i)",
                "generator = None",
            ),
        ],
        "test_evaluate::test_the_pieces_of_a_response_join_to_its_text_even_where_letters_have_several_tokens": [
            ("letters of several tokens are lost", "seen = len(text) if whole else seen", "seen = len(text)"),
        ],
        "test_evaluate::test_the_numbers_of_each_token_are_those_that_ppo_would_have_learned_from": [
            ("the viewer's score is not cut", "scores.clamp(-ppo.score_clip, ppo.score_clip)", "scores"),
            ("the viewer knows no penalty", "- ppo.missing_eos_penalty * ~", "- 0 * ~"),
        ],
        "test_evaluate::test_viewer_json_tells_each_token_of_both_answers": [
            (
                "the viewer's tokens of another prompt",
                "prompts[rows - start].to(device)",
                "prompts[rows * 0].to(device)",
            ),
        ],
        "test_evaluate::test_the_prompts_of_the_viewer_are_spread_over_all_lengths": [
            ("the viewer shows the shortest prompts", "np.linspace(0, cfg.prompts - 1, min", "np.arange(min"),
        ],
    },
    "frontier.py": {
        "test_frontier::test_every_method_has_every_coefficient_and_seed_on_the_same_terms": [
            (
                "a controller that brings all runs to one KL",
                '"--kl_coef", coef, "--kl_target", 0)',
                '"--kl_coef", coef)',
            ),
        ],
        "test_frontier::test_the_best_of_n_has_the_highest_reward_of_n_answers_and_the_kl_of_its_bound": [
            ("the worst of n", "scores[:n].argmax(0)", "scores[:n].argmin(0)"),
            ("n times the same answer", "return 1 + 1000 * seed + i", "return 1 + 1000 * seed"),
        ],
        "test_frontier::test_methods_are_compared_where_their_frontiers_cross_a_kl": [
            ("points beyond the last one", "if nats <= kl[-1]:", "if True:"),
        ],
        "test_frontier::test_the_ablation_tells_differences_within_a_seed": [
            ("differences to one seed", 'less[row["seed"]][name]', "less[0][name]"),
        ],
    },
    "metrics.py": {
        "test_metrics::test_the_kl_three_ways_gives_the_golden_numbers": [
            ("k3 of the reference", "(-d).expm1() + d", "d.expm1() - d"),
            ("kl_exact weighed by the reference", "(logp.exp() * diff)", "((logp - diff).exp() * diff)"),
        ],
        "test_metrics::test_repetition_is_the_share_of_ngrams_that_were_there_before": [
            ("repetition upside down", "[1 - len(set(some)) / len(some)", "[len(set(some)) / len(some)"),
        ],
        "test_metrics::test_perplexity_is_of_all_tokens_together": [
            (
                "perplexity as a mean over responses",
                "return jackknife(*map(np.exp, leave_one_out(nll.sum(), nll, lengths)))",
                "return np.exp(nll / lengths)",
            ),
        ],
        "test_metrics::test_the_interval_of_distinct_is_as_wide_as_new_responses_would_scatter": [
            ("an interval that hardly has a width", "whole + (len(without) - 1) * (", "whole + ("),
        ],
        "test_metrics::test_every_difference_is_paired_and_has_a_narrower_interval_than_two_samples_apart": [
            (
                "the other side answers another prompt",
                "= after[name] - before[name]",
                "= after[name] - before[name][::-1]",
            ),
        ],
        "test_metrics::test_the_ratio_of_perplexities_is_paired_too": [
            ("a ratio of two samples", "/ theirs[rows].mean()", "/ theirs[rows[::-1] // 2].mean()"),
        ],
        "test_metrics::test_measure_tells_value_interval_and_spread": [
            ("a KL of 0 counted as below 0", "(values[name] < 0).mean()", "(values[name] <= 0).mean()"),
        ],
        "test_metrics::test_the_second_model_reads_each_response_as_transformers_does": [
            ("the second model is charged for the prompt", "end > len(prompt) for", "end > 0 for"),
            ("the second model begins with the prompt", "[start, *row]", "row"),
        ],
        "test_metrics::test_a_second_model_is_read_from_safetensors_alone_and_runs_no_code": [
            ("a pickle is read", "dict(use_safetensors=True, ", "dict("),
        ],
    },
    "card.py": {
        "test_card::test_the_samples_are_a_table_in_which_nothing_stays_markup": [
            ("generated text as Markdown", 'f"&#{ord(c)};" if c in', "c if c in"),
        ],
        "test_card::test_nothing_untrusted_becomes_markup": [
            ("the reward's name as Markdown", "score is by {quote(cfg.reward)}", "score is by {cfg.reward}"),
        ],
        "test_card::test_a_readme_by_other_hands_stays_and_ours_is_replaced": [
            ("a README.md by other hands is replaced", "if file.exists() and not is_our_card(file):", "if False:"),
        ],
    },
    "report.py": {
        "test_report::test_every_text_of_a_run_stays_text": [
            ("page without autoescape", "autoescape=True", "autoescape=False"),
        ],
        "test_report::test_the_page_has_every_sample_with_its_numbers": [
            ("page with before as after", "response(sample[side])", 'response(sample["before"])'),
        ],
        "test_report::test_the_table_has_the_numbers_of_the_evaluation_and_the_paired_differences": [
            ("table of the page with before twice", "cell(after[name], DIGITS", "cell(before[name], DIGITS"),
        ],
        "test_report::test_a_curve_goes_through_the_numbers_of_the_log": [
            ("curves of the page upside down", "HEIGHT - BOTTOM - up *", "TOP + up *"),
        ],
        "test_report::test_the_band_is_one_standard_error_to_either_side_and_the_target_a_line": [
            ("band of the page to one side", "for sign in (-1, 1)]", "for sign in (0, 1)]"),
        ],
        "test_report::test_the_colours_are_even_around_the_centre_and_a_few_outliers_do_not_wash_them_out": [
            ("colours as wide as the largest number", "0.98)) if values", "1.0)) if values"),
            ("colours of a ratio below 0", "min(spread, centre or spread)", "spread"),
        ],
        "test_report::test_a_missing_or_damaged_file_is_one_line_that_names_it_and_the_old_page_stays": [
            ("nan into the page's JSON", "if not math.isfinite(x):", "if False:"),
            ("tokens without their numbers", "if len(checked[name]) != len(tokens):", "if False:"),
        ],
    },
    "report.html.jinja": {
        "test_report::test_every_text_of_a_run_stays_text": [
            (
                "JSON in the page unescaped",
                "{{ viewer | tojson }}",
                '{{ viewer | tojson | replace("\\\\u003c", "<") | safe }}',
            ),
            ("a caption as markup", "{{ caption }}", "{{ caption | safe }}"),
        ],
        "test_report::test_the_page_points_nowhere_and_lets_in_its_own_script_and_style_alone": [
            ("any inline script runs", "script-src '{{ script_hash }}'", "script-src 'unsafe-inline'"),
            ("the page may use the network", "default-src 'none'", "default-src *"),
        ],
    },
}


def copy(folder):
    """A copy of the tree in folder; returns folder as a Path."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.jinja")]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", Path(folder, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
    Path(folder, "asset").symlink_to(ROOT / "asset")
    return Path(folder)


def pytest(tree, tests):
    """Run tests of a tree; returns the exit status: 0 all green, 1 one is red or not done within LIMIT seconds."""
    process = FORKS.Process(target=_pytest, args=(tree, [f"tests/{test.replace('::', '.py::')}" for test in tests]))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return 1
    return process.exitcode


def _pytest(tree, names):
    import pytest

    os.chdir(tree)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *names]))


def verdict(file, test, right, wrong):
    """'caught', or what is wrong: 'survived', 'stale', or 'broken' where the mutant is no program any more."""
    with tempfile.TemporaryDirectory() as folder:
        mutated = copy(folder) / file
        source = mutated.read_text(encoding="utf-8")
        if source.count(right) != 1:
            return "stale"
        mutated.write_text(source.replace(right, wrong), encoding="utf-8")
        return {0: "survived", 1: "caught"}.get(pytest(folder, [test]), "broken")


def main(words):
    chosen = [
        (name, file, test, right, wrong)
        for file, tests in MUTANTS.items()
        for test, mutants in tests.items()
        for name, right, wrong in mutants
        if not words or any(word in name for word in words)
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        if pytest(copy(folder), sorted({test for _, _, test, _, _ in chosen})):
            sys.exit(f"error: a test is red, or takes over {LIMIT} s, without any mutant: run make test")
    bad = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for (name, file, *_), found in zip(chosen, pool.map(lambda mutant: verdict(*mutant[1:]), chosen)):
            bad += found != "caught"
            print(f"{found:<8}  {file:<16}  {name}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
