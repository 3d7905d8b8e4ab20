"""train.py - train the embedded model on one GPU, by the clock.

A llama-architecture transformer over bytes, exactly as llama.cpp computes it: RMSNorm, SwiGLU, RoPE over interleaved
pairs, grouped-query attention, no QK-norm, no biases. Problems are generated on the fly, so that every one of them is
new to the model and the progress lines, which say how many were answered without one wrong byte, are honest.
The loss covers the answers only. Needs torch >= 2.10 and numpy, not the kvarn package; run it as a script:

    python train.py --seconds 1000 --out weights       # then: python export.py weights kvarn-tasks.gguf

SPDX-License-Identifier: MIT
"""
import argparse
import math
import multiprocessing as mp
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tasks
import torch
import torch.nn.functional as F

BOS, EOS, VOCAB = 256, 257, 258
MAX_DOCS, MAX_PROBLEMS = 128, 512  # in one batch
FAMILY_NAMES = list(tasks.FAMILIES)


@dataclass
class Config:
    layers: int = 7
    width: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    ffn: int = 1408
    context: int = 16384
    rope_base: float = 500000.0
    eps: float = 1e-5


# ---- data: flat batches of whole documents, cut apart by cumulative lengths

@dataclass
class Batch:
    """One flat batch: int16/int32 arrays of `tokens` entries, and the problems that lie in it completely."""

    tokens: np.ndarray
    targets: np.ndarray    # next token inside an answer, -100 elsewhere
    positions: np.ndarray  # inside the document
    problem: np.ndarray    # which problem a target belongs to
    offsets: np.ndarray    # MAX_DOCS + 1 cumulative document lengths
    families: list[int]    # of each complete problem


def pack(documents: list[list[tasks.Problem]], size: int) -> Batch:
    """Lay documents (chains of problems) end to end; what reaches beyond `size` tokens is cut."""
    tokens, answer, position, problem = (np.full(size + 1, fill, dtype) for fill, dtype in
                                         ((EOS, np.int16), (False, bool), (0, np.int32), (MAX_PROBLEMS - 1, np.int16)))
    offsets, families, end = [0], [], 0
    for chain in documents:
        start = end
        for p in chain:
            lead = [BOS] if end == start else []
            ids = np.frombuffer(p.prompt.encode() + p.answer.encode(), np.uint8)
            ids = np.concatenate([lead, ids, [EOS]]).astype(np.int16)[:max(0, size + 1 - end)]
            stop = end + len(ids)
            tokens[end:stop] = ids
            answer[end + len(lead) + len(p.prompt):stop] = True
            if stop <= size and len(families) < MAX_PROBLEMS - 1:
                problem[end:stop] = len(families)
                families.append(FAMILY_NAMES.index(p.family))
            end = stop
        position[start:end] = np.arange(end - start)
        offsets.append(min(end, size))
    if end < size:
        offsets.append(size)
    if len(offsets) > MAX_DOCS + 1:
        raise ValueError(f"{len(offsets) - 1} documents in one batch: at most {MAX_DOCS}")
    offsets += [size] * (MAX_DOCS + 1 - len(offsets))
    targets = np.where(answer[1:], tokens[1:], -100).astype(np.int16)
    return Batch(tokens[:-1], targets, position[:-1], problem[1:], np.array(offsets, np.int32), families)


def draw_documents(rng: random.Random, size: int, progress: float, shares, context: int) -> list[list[tasks.Problem]]:
    """Enough documents for one batch. Answers grow longer during the first third; later some documents hold several problems."""
    largest = 500 * 8 ** min(1.0, progress / 0.3)
    documents, total = [], 0
    while total < size:
        chain, length = [], 1
        more = progress > 0.3 and rng.random() < 0.12
        room = min(context, size - total)
        while not chain or (more and len(chain) < 6) or (len(documents) == MAX_DOCS - 2 and length < room):
            if rng.random() < 0.5:
                want = math.exp(rng.uniform(math.log(120), math.log(largest)))
            else:
                want = rng.uniform(120, largest)
            p = tasks.make(rng.choices(FAMILY_NAMES, shares)[0], rng, round(want))
            length += len(p.prompt) + len(p.answer) + 1
            if chain and length > room:
                break
            chain.append(p)
        documents.append(chain)
        total += sum(len(p.prompt) + len(p.answer) + 1 for p in chain) + 1
    return documents


def produce(queue: mp.Queue, seed: int, size: int, progress, shares, context: int) -> None:
    rng = random.Random(f"train/{seed}")
    while True:
        queue.put(pack(draw_documents(rng, size, progress.value, list(shares), context), size))


# ---- model

def rope_table(cfg: Config, device: torch.device) -> torch.Tensor:
    """[context, head_dim / 2, 2]: cosine and sine."""
    freq = cfg.rope_base ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
    angle = torch.arange(cfg.context, dtype=torch.float64)[:, None] * freq
    return torch.stack([angle.cos(), angle.sin()], -1).float().to(device)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim]: rotate the pairs (0, 1), (2, 3), ... as llama.cpp's NORM rope does."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    """Causal attention inside each document; q [T, H, D], k and v [T, H_kv, D]."""
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))
    parts = []
    for lo, hi in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        if hi > lo:
            one = (x[lo:hi].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


class Model(torch.nn.Module):
    """Parameters carry GGUF tensor names with dots written as underscores."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        out_std = 0.02 / math.sqrt(2 * cfg.layers)
        self.add("token_embd", VOCAB, cfg.width, 0.02)
        self.add("output", VOCAB, cfg.width, 0.02)
        self.add("output_norm", cfg.width)
        for i in range(cfg.layers):
            self.add(f"blk_{i}_attn_norm", cfg.width)
            self.add(f"blk_{i}_attn_q", q, cfg.width, 0.02)
            self.add(f"blk_{i}_attn_k", kv, cfg.width, 0.02)
            self.add(f"blk_{i}_attn_v", kv, cfg.width, 0.02)
            self.add(f"blk_{i}_attn_output", cfg.width, q, out_std)
            self.add(f"blk_{i}_ffn_norm", cfg.width)
            self.add(f"blk_{i}_ffn_gate", cfg.ffn, cfg.width, 0.02)
            self.add(f"blk_{i}_ffn_up", cfg.ffn, cfg.width, 0.02)
            self.add(f"blk_{i}_ffn_down", cfg.width, cfg.ffn, out_std)

    def add(self, name: str, rows: int, columns: int = 0, std: float = 0.0) -> None:
        value = torch.randn(rows, columns) * std if columns else torch.ones(rows)
        self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, tokens, positions, offsets, table):
        cfg = self.cfg
        x = self.token_embd[tokens]
        cos_sin = table[positions]
        for i in range(cfg.layers):
            def w(name):
                return getattr(self, f"blk_{i}_{name}")
            h = F.rms_norm(x, (cfg.width,), w("attn_norm"), cfg.eps)
            q = rotate(F.linear(h, w("attn_q")).unflatten(-1, (cfg.heads, -1)), cos_sin)
            k = rotate(F.linear(h, w("attn_k")).unflatten(-1, (cfg.kv_heads, -1)), cos_sin)
            v = F.linear(h, w("attn_v")).unflatten(-1, (cfg.kv_heads, -1))
            x = x + F.linear(attend(q, k, v, offsets, cfg.context).flatten(-2), w("attn_output"))
            h = F.rms_norm(x, (cfg.width,), w("ffn_norm"), cfg.eps)
            x = x + F.linear(F.silu(F.linear(h, w("ffn_gate"))) * F.linear(h, w("ffn_up")), w("ffn_down"))
        return F.linear(F.rms_norm(x, (cfg.width,), self.output_norm, cfg.eps), self.output)


def loss_and_misses(model: Model, tokens, targets, positions, problem, offsets, table):
    """Mean loss over the answer tokens, and the number of wrong arg-maxima per problem [MAX_PROBLEMS]."""
    logits = model(tokens, positions, offsets, table).float()
    loss = F.cross_entropy(logits, targets, ignore_index=-100)
    wrong = ((logits.argmax(-1) != targets) & (targets >= 0)).float()
    return loss, torch.zeros(MAX_PROBLEMS, device=wrong.device).index_add_(0, problem, wrong)


# ---- optimizer: Muon for the matrices of the blocks, AdamW for the rest

class Muon:
    """Momentum, orthogonalized by five Newton-Schulz steps; matrices of one shape go through it together."""

    def __init__(self, params: list[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.05):
        self.groups: dict[tuple, list] = {}
        for p in params:
            self.groups.setdefault(tuple(sorted(p.shape)), []).append((p, torch.zeros_like(p)))
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (rows, columns), group in self.groups.items():
            grads, moments = [p.grad for p, _ in group], [m for _, m in group]
            torch._foreach_lerp_(moments, grads, 1 - self.momentum)
            look_ahead = torch._foreach_lerp(grads, moments, self.momentum)
            flip = [g.shape[0] > g.shape[1] for g in look_ahead]
            x = orthogonalize(torch.stack([g.T if f else g for g, f in zip(look_ahead, flip)]))
            scale = lr * 0.2 * math.sqrt(columns)  # as large per element as an AdamW step
            params = [p for p, _ in group]
            torch._foreach_mul_(params, 1 - lr * self.decay)
            torch._foreach_add_(params, [u.T if f else u for u, f in zip(x.float(), flip)], alpha=-scale)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns], rows <= columns: push all singular values towards 1."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def schedule(progress: float) -> float:
    """Learning-rate factor: short warm-up, flat until a third, then straight down."""
    return min(1.0, progress / 0.02) * min(1.0, max(0.01, (1 - progress) / 0.67))


# ---- checkpoints and the final examination

def save(model: Model, folder: Path) -> None:
    """float16 arrays in a few files below 16 MB each."""
    part, size, n = {}, 0, 0
    items = [(k, v.detach().to("cpu", torch.float16).numpy()) for k, v in model.named_parameters()]
    for name, value in [*items, (None, None)]:
        if name is None or size + value.nbytes > 15_000_000:
            np.savez(folder / f"weights{n}.npz", **part)
            part, size, n = {}, 0, n + 1
        if name is not None:
            part[name] = value
            size += value.nbytes
    np.savez(folder / "config.npz", **asdict(model.cfg))


@torch.no_grad()
def restore(model: Model, folder: Path) -> None:
    for file in sorted(folder.glob("weights*.npz")):
        with np.load(file) as part:
            for name in part.files:
                model.get_parameter(name).copy_(torch.from_numpy(part[name]))


@torch.no_grad()
def round_to_q8_0(model: Model) -> None:
    """Give the matrices the values that the GGUF will hold: blocks of 32 with an f16 scale."""
    for p in model.parameters():
        if p.ndim == 2:
            blocks = p.data.view(-1, 32)
            scale = blocks.abs().amax(1, keepdim=True) / 127
            codes = torch.round(blocks / scale.clamp(min=1e-30))
            p.data = (codes * scale.half().float()).view_as(p)


def examine(forward, device, table, size: int, n: int, seed: int) -> None:
    """Exact answers on fresh problems. All arg-maxima right given the right past = greedy decoding finds the answer."""
    for index, family in enumerate(FAMILY_NAMES):
        pending, results = list(tasks.problems(family, n, seed)), []
        while pending:
            chosen, total = [], 0
            while pending and total + len(pending[-1].prompt) + len(pending[-1].answer) + 2 <= size and len(chosen) < 100:
                chosen.append(pending.pop())
                total += len(chosen[-1].prompt) + len(chosen[-1].answer) + 2
            batch = pack([[p] for p in chosen], size)
            with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                misses = forward(*upload(batch, device), table)[1].tolist()
            results += [(len(p.answer), misses[i] == 0) for i, p in enumerate(chosen)]
        shares = []
        for lo, hi in ((0, 1000), (1000, 2000), (2000, 9999)):
            hits = [ok for length, ok in results if lo <= length < hi]
            shares.append(f"{sum(hits):4}/{len(hits):<4}")
        lengths = [length for length, _ in results]
        print(f"exam {family:5} exact {sum(ok for _, ok in results) / n:.3f}  by length: below 1000 {shares[0]} "
              f"1000-2000 {shares[1]} above {shares[2]}  answers {min(lengths)}..{max(lengths)}", flush=True)


def upload(batch: Batch, device: torch.device) -> list[torch.Tensor]:
    arrays = (batch.tokens, batch.targets, batch.positions, batch.problem, batch.offsets)
    kinds = (torch.int64, torch.int64, torch.int64, torch.int64, torch.int32)
    tensors = [torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":  # pinned, so that the copy does not wait for the steps before it
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(kind) for t, kind in zip(tensors, kinds)]


class Results:
    """Exact answers per family, read a few steps late so that the GPU never waits for the host."""

    def __init__(self):
        self.pending: list[tuple] = []
        self.clear()

    def clear(self) -> None:
        self.exact, self.seen = np.zeros(len(FAMILY_NAMES)), np.zeros(len(FAMILY_NAMES))

    def add(self, misses: torch.Tensor, families: list[int]) -> None:
        event = torch.cuda.Event() if misses.is_cuda else None
        self.pending.append((misses.to("cpu", non_blocking=True), families, event))
        if event:
            event.record()
        if len(self.pending) > 4:
            misses, families, event = self.pending.pop(0)
            if event:
                event.synchronize()
            np.add.at(self.seen, families, 1)
            np.add.at(self.exact, families, misses[:len(families)].numpy() == 0)


def main() -> None:
    ap = argparse.ArgumentParser(description="Train the embedded model of kvarn on one GPU, by the clock.")
    ap.add_argument("--seconds", type=float, default=1000, help="training time, compilation not counted")
    ap.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    ap.add_argument("--batch", type=int, default=65536, help="tokens per step")
    ap.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--layers", type=int, default=Config.layers)
    ap.add_argument("--ffn", type=int, default=Config.ffn)
    ap.add_argument("--width", type=int, default=Config.width)
    ap.add_argument("--resume", type=Path, help="start from the weights in this folder")
    ap.add_argument("--progress", type=float, default=0.0, help="where in the schedule to start (with --resume)")
    ap.add_argument("--seed", type=int, default=0, help="first seed of the data workers")
    ap.add_argument("--workers", type=int, default=10)
    ap.add_argument("--exam", type=int, default=200, help="fresh problems per family at the end")
    ap.add_argument("--report", type=float, default=15, help="seconds between progress lines")
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = Config(layers=args.layers, ffn=args.ffn, width=args.width)
    progress, shares = mp.Value("d", args.progress, lock=False), mp.Array("d", [1.0] * len(FAMILY_NAMES), lock=False)
    queue = mp.Queue(3 * args.workers)
    for worker in range(args.workers):
        arguments = (queue, args.seed + worker, args.batch, progress, shares, cfg.context)
        mp.Process(target=produce, args=arguments, daemon=True).start()

    model = Model(cfg).to(device)
    if args.resume:
        restore(model, args.resume)
    table = rope_table(cfg, device)
    forward = torch.compile(loss_and_misses) if device.type == "cuda" else loss_and_misses
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blk")]
    muon = Muon(matrices) if args.optimizer == "muon" else None
    muon_ids = {id(p) for p in matrices} if muon else set()
    rest = [p for p in model.parameters() if id(p) not in muon_ids]
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.05},
                               {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}],
                              betas=(0.9, 0.95), fused=device.type == "cuda")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {cfg}, {args}", flush=True)

    def gradient(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, misses = forward(model, *upload(batch, device), table)
        loss.backward()
        return loss.detach(), misses

    gradient(queue.get())  # compile before the clock starts
    model.zero_grad(set_to_none=True)
    start = last = saved = time.monotonic()
    step = steps_then = 0
    losses, results = [], Results()
    while (now := time.monotonic()) - start < args.seconds:
        progress.value = args.progress + (1 - args.progress) * (now - start) / args.seconds
        loss, misses = gradient(batch := queue.get())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = args.lr * schedule(progress.value)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        if muon:
            muon.step(lr)
        model.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss)
        results.add(misses, batch.families)
        if now - last > args.report:
            mean = torch.stack(losses).mean().item()
            right = results.exact / np.maximum(results.seen, 1)
            shares[:] = (1.3 - right).tolist()  # what goes wrong is practised more
            families = " ".join(f"{f} {x:.3f}" for f, x in zip(FAMILY_NAMES, right))
            rate = (step - steps_then) * args.batch / (now - last) / 1e3
            print(f"{now - start:5.0f} s  step {step}  loss {mean:.5f}  |g| {norm.item():.2f}  lr {lr:.5f}  {rate:.0f} ktok/s"
                  f"  queue {queue.qsize()}  exact: {families}", flush=True)
            losses, last, steps_then = [], now, step
            results.clear()
            if now - saved > 60:
                save(model, args.out)
                saved = now
    save(model, args.out)
    print(f"trained {step} steps, {step * args.batch / 1e6:.0f} M tokens, {time.monotonic() - start:.0f} s", flush=True)
    round_to_q8_0(model)
    if args.exam:
        examine(lambda *a: forward(model, *a), device, table, args.batch, args.exam, seed=1_000_000)
    print("done", flush=True)


if __name__ == "__main__":
    main()
