"""transformers' models made from a GGUF file, in float32 on exactly the dequantised weights.

transformers' own loader of GGUF is not used: it changes tokenizers. Dequantisation is the `gguf`
package's; tensors are mapped to transformers' names here. Runs under the peers' Python."""
import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Source:
    """A GGUF file: its keys and its tensors as float32."""

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.key("general.architecture")

    def key(self, name):
        return self.reader.fields[name].contents()

    def of_architecture(self, name):
        return self.key(f"{self.architecture}.{name}")

    def tensor(self, name):
        tensor = self.tensors[name]
        # A copy: tensors that are float32 already would otherwise be the read-only file itself.
        return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type),
                        dtype=np.float32, order="C")


def unpermuted(weights, n_heads):
    """GGUF's llama stores rows of a head as pairs (d, d + 1); transformers wants (d, d + half)."""
    rows, columns = weights.shape
    half = rows // n_heads // 2
    return np.ascontiguousarray(
        weights.reshape(n_heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns))


def load_model(source, attention="eager"):
    """attention: eager for comparing numbers, sdpa for comparing speed"""
    n_heads = source.of_architecture("attention.head_count")
    n_kv_heads = source.of_architecture("attention.head_count_kv")
    vocabulary = source.tensor("token_embd.weight")
    tied = "output.weight" not in source.tensors
    is_llama = source.architecture == "llama"
    shape = dict(
        vocab_size=vocabulary.shape[0],
        hidden_size=source.of_architecture("embedding_length"),
        intermediate_size=source.of_architecture("feed_forward_length"),
        num_hidden_layers=source.of_architecture("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=source.of_architecture("context_length"),
        rms_norm_eps=source.of_architecture("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default",
                         "rope_theta": source.of_architecture("rope.freq_base")},
        tie_word_embeddings=False,
    )
    if is_llama:
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=attention))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation=attention))
    weights = {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": source.tensor("output_norm.weight"),
        "lm_head.weight": vocabulary if tied else source.tensor("output.weight"),
    }
    for layer in range(shape["num_hidden_layers"]):
        for ours, theirs in (("attn_norm", "input_layernorm"),
                             ("ffn_norm", "post_attention_layernorm"),
                             ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                             ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                             ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
                             ("ffn_down", "mlp.down_proj")):
            for kind in ("weight", "bias"):
                name = f"blk.{layer}.{ours}.{kind}"
                if name not in source.tensors:
                    continue
                values = source.tensor(name)
                if is_llama and ours in ("attn_q", "attn_k"):
                    values = unpermuted(values, n_heads if ours == "attn_q" else n_kv_heads)
                weights[f"model.layers.{layer}.{theirs}.{kind}"] = values
    model = model.to(torch.float32)
    # Every parameter must be given and nothing may be left over: a forgotten bias would go unseen.
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()},
                          strict=True)
    return model.eval()


def load_tokenizer(source):
    vocabulary = {token: i for i, token in enumerate(source.key("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in source.key("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if source.key("tokenizer.ggml.pre") == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer, vocabulary
