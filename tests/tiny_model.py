"""tiny_model.py - writes random-weight GGUF models in a fraction of a second: any head size, grouped queries, a byte tokenizer.

    python tests/tiny_model.py out.gguf [arch] [head_dim]

The output matrix is not tied to the embedding: with tied random weights a model repeats its last token and attention has no say.

SPDX-License-Identifier: MIT
"""

import sys

import gguf
import numpy as np

ARCHS = ("llama", "qwen3", "gemma3", "mimo2")


def byte_vocabulary(readable: bool = False):
    """260 tokens in sentencepiece's manner: three control tokens, the 256 bytes, and its space.

    readable     two letters in the place of every byte that is neither ASCII nor a new line: llama-cpp-python waits, ever
                 slower, for the rest of a character that a byte has begun, and a byte like ESC moves the cursor
    """
    tokens, types = [b"<unk>", b"<s>", b"</s>"], [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL]*2
    for byte in range(256):
        is_byte = not readable or 32 <= byte < 127 or byte == 10
        tokens.append((f"<0x{byte:02X}>" if is_byte else chr(97 + byte//26) + chr(97 + byte % 26)).encode())
        types.append(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    return tokens + ["\u2581".encode()], types + [gguf.TokenType.NORMAL], [0.0]*(len(tokens) + 1)


def write(path, arch: str = "llama", head_dim: int = 128, n_layer: int = 2, n_head: int = 4, n_head_kv: int = 2, n_embd: int = 64,
          n_ff: int = 128, n_ctx: int = 131072, window: int = 256, loud: float = 0.0, loud_tokens: int = 0,
          gain: float = 2.0, seed: int = 1, value_dim: int = 0, kv_heads: "tuple[int, ...]" = (),
          chat_template: str = "", readable: bool = False, nextn: int = 0, rope_dim: int = 0, yarn: float = 0.0):
    """Writes a model to path and returns path.

    window       sliding window (gemma3, mimo2: of the first of two layers)
    loud         adds this to the gain of a few channels of the keys, as real models have them
    loud_tokens  so many bytes, from "0" on, share a direction that the keys amplify: tokens with keys a few times longer
    value_dim    head size of the values, kv_heads: KV heads of each layer (mimo2 only)
    gain         of queries and keys: the larger, the more a query looks at few tokens
    readable     see byte_vocabulary()
    rope_dim     channels that turn with the position; 0: all
    yarn         factor of a context stretched by YaRN, from 256 tokens
    nextn        blocks that draft the token after the next (mimo2 only); the others then say less, so that drafts are often right
    """
    rng = np.random.default_rng(seed)
    tokens, types, scores = byte_vocabulary(readable)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(f"tiny-{arch}-{head_dim}")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer + nextn)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    heads = list(kv_heads) or [n_head_kv]*(n_layer + nextn)
    value_dim = value_dim or head_dim
    writer.add_head_count_kv(heads if kv_heads else n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(value_dim)
    writer.add_rope_dimension_count(rope_dim or head_dim)
    if yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn)
        writer.add_rope_scaling_orig_ctx_len(256)
    writer.add_layer_norm_rms_eps(1e-6)
    if arch in ("gemma3", "mimo2"):
        writer.add_sliding_window(window)
    if arch == "mimo2":
        writer.add_sliding_window_pattern([layer % 2 == 0 and layer < n_layer for layer in range(n_layer + nextn)])
        writer.add_expert_feed_forward_length(n_ff)
    if nextn:
        writer.add_nextn_predict_layers(nextn)
    if chat_template:
        writer.add_chat_template(chat_template)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)

    def matrix(name, rows, columns, gain=1.0):
        weights = rng.standard_normal((rows, columns))*gain/np.sqrt(columns)
        writer.add_tensor(name + ".weight", weights.astype(np.float16))
        return weights

    def ones(name, size):
        writer.add_tensor(name + ".weight", np.ones(size, np.float32))

    def attention(block, n_heads):
        matrix(block + "attn_q", n_head*head_dim, n_embd, gain=gain)
        keys = rng.standard_normal((n_heads*head_dim, n_embd))*gain/np.sqrt(n_embd)
        keys[::head_dim//4] *= 1 + loud
        if loud_tokens:
            keys += np.outer(rng.standard_normal(n_heads*head_dim), direction)*4*gain/n_embd
        writer.add_tensor(block + "attn_k.weight", keys.astype(np.float16))
        matrix(block + "attn_v", n_heads*value_dim, n_embd, gain=2.0)

    embedding = rng.standard_normal((len(tokens), n_embd))
    direction = rng.standard_normal(n_embd)
    first = 3 + ord("0")
    embedding[first:first + loud_tokens] = direction + 0.5*embedding[first:first + loud_tokens]
    writer.add_tensor("token_embd.weight", embedding.astype(np.float16))
    matrix("output", len(tokens), n_embd, gain=3.0)
    ones("output_norm", n_embd)
    out = 0.3 if nextn else 1.0
    for layer in range(n_layer + nextn):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            ones(block + norm, n_embd)
        if arch == "gemma3":
            for norm in ("post_attention_norm", "post_ffw_norm"):
                ones(block + norm, n_embd)
        if arch in ("qwen3", "gemma3"):
            for norm in ("attn_q_norm", "attn_k_norm"):
                ones(block + norm, head_dim)
        if layer >= n_layer:
            for norm in ("enorm", "hnorm"):
                ones(block + "nextn." + norm, n_embd)
            writer.add_tensor(block + "nextn.eh_proj.weight", np.eye(n_embd, 2*n_embd, dtype=np.float16))
            matrix(block + "attn_qkv", (n_head + heads[layer])*head_dim + heads[layer]*value_dim, n_embd, gain=gain)
        else:
            attention(block, heads[layer])
        matrix(block + "attn_output", n_embd, n_head*value_dim, out)
        matrix(block + "ffn_gate", n_ff, n_embd)
        matrix(block + "ffn_up", n_ff, n_embd)
        matrix(block + "ffn_down", n_embd, n_ff, out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    write(sys.argv[1], *sys.argv[2:3], *map(int, sys.argv[3:4]))
