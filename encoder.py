"""A BERT encoder from scratch: a WordPiece of the reviews, and masked-token prediction (Devlin et al. 2018).

For where no pretrained encoder is at hand, or none is small enough: reward.py --init_from scratch begins with this.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import replacing
from data import block_order, encode, train_wordpiece
from log import RunLog
from model import random_generator
from optimizer import Stepper, make_optimizers, warm_up_and_decay


def mask_tokens(ids, tokenizer, generator):
    """The inputs of masked-token prediction (Devlin et al. 2018, section 3.1) and where they are masked: (B, L) each.

    ids: (B, L). 15 % of the tokens are to be predicted, [CLS] and [SEP] never; of those 80 % become [MASK], 10 % a
    random token, and 10 % stay, so that every input may be wrong.
    """
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    masked = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    draw = torch.rand(ids.shape, generator=generator)
    inputs = torch.where(masked & (draw < 0.8), tokenizer.mask_token_id, ids)
    anything = torch.randint(len(tokenizer), ids.shape, generator=generator)
    return torch.where(masked & (draw >= 0.9), anything, inputs), masked


def pretrain(cfg, texts, device, bf16):
    """Make an encoder from scratch: a WordPiece of texts, and a BERT that learned to fill in their masked tokens.

    Writes a Hugging Face folder, <out>/encoder, and returns its path: a start for the classifiers like bert-base-cased.
    """
    from transformers import BertConfig, BertForMaskedLM

    print(f"training a tokenizer of {cfg.vocab_size:,} tokens", flush=True)
    tokenizer = train_wordpiece(texts, cfg.vocab_size)
    tokenizer.model_max_length = cfg.max_length
    torch.manual_seed(cfg.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        intermediate_size=4 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length,
        hidden_dropout_prob=0.0,  # 15 % of a few epochs is too little to learn by heart
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config).to(device).train()
    matrices = [p for p in model.bert.encoder.parameters() if p.dim() == 2]
    optimizers = make_optimizers(model, matrices, cfg.pretrain_lr, cfg.weight_decay, muon_lr=cfg.muon_lr)
    stepper, log = Stepper(model, optimizers, cfg.grad_clip), RunLog(cfg, model, part="encoder")
    inner = cfg.max_length - 2  # [CLS] and [SEP] stand around each block
    stream = np.concatenate([np.array(ids, dtype=np.int64) for ids in encode(texts, tokenizer)])
    blocks = stream[: len(stream) // inner * inner].reshape(-1, inner)
    blocks = np.pad(
        blocks, ((0, 0), (1, 1)), constant_values=((0, 0), (tokenizer.cls_token_id, tokenizer.sep_token_id))
    )
    blocks = torch.from_numpy(blocks)
    steps = math.ceil(int(cfg.pretrain_epochs * len(blocks)) / cfg.batch_size)
    progress = tqdm(range(steps), "pretrain the encoder", unit="step")
    for step in progress:
        rows = block_order(step, len(blocks), cfg.batch_size, cfg.pretrain_epochs, cfg.seed)
        inputs, masked = mask_tokens(blocks[rows], tokenizer, random_generator("cpu", cfg.seed, 6, step))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = model.bert(inputs.to(device)).last_hidden_state[masked]  # (masked tokens, C)
            logits = model.cls(hidden)
        loss = F.cross_entropy(logits.float(), blocks[rows][masked].to(device))
        loss.backward()
        stepper.set_lr(warm_up_and_decay(step, steps))
        log.write(step, loss=loss.item(), grad_norm=stepper.step(), skipped_steps=stepper.skipped)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    log.close()
    with replacing(log.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(log.out)
