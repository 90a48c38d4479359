"""Checkpoint folders that look like those of the hub: bfloat16 safetensors, tied and untied,
several architectures, a fast tokenizer with a chat template whose end of sequence is not its
padding, a vocabulary that is padded beyond the tokenizer, a generation config with opinions"""

import functools
import json
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

chat = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
text = "the sum of 3 and 4 is 7, so we now add 12 and 30 ; what is left of a word is its end . " * 4
sizes = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.2,
)
grouped = sizes | dict(num_key_value_heads=1, head_dim=32)
kinds = dict(
    llama=("LlamaConfig", grouped),
    qwen3=("Qwen3Config", grouped),
    gpt_neox=("GPTNeoXConfig", sizes),
    gemma3=("Gemma3TextConfig", grouped | dict(sliding_window=16)),
    mistral=("MistralConfig", grouped | dict(sliding_window=16)),
)


@functools.cache
def tokenizer():
    "A byte-level tokenizer with a chat template"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat,
    )


def hub_folder(
    path,  # Where it is written
    kind="qwen3",  # One of `kinds`
    tied=True,  # One matrix for embedding and output layer
    seed=0,  # Of the weights
    **more,  # Other values of the configuration
):
    "Write a checkpoint folder and return it as text"
    tok = tokenizer()
    name, values = kinds[kind]
    padded = -(-len(tok) // 64) * 64 + 64
    config = getattr(transformers, name)(
        vocab_size=padded,
        tie_word_embeddings=tied,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
        **values | more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.05,
        eos_token_id=[tok.eos_token_id, tok.pad_token_id],
        pad_token_id=tok.pad_token_id,
    )
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    assert list(Path(path).glob("*.safetensors"))
    return str(path)


def log_files(folder):
    "Small logs as the pages name them: `interactions.csv`, and Amazon reviews of 2023 in `amazon`"
    rows, about = [], {}
    for user in range(30):
        for step in range(8):
            item = (3 * user + step * step) % 12
            about[item] = f"thing number {item}"
            rows.append((f"u{user}", f"i{item}", 1500000000 + 86400 * (7 * user + step)))
    lines = ["user,item,time,title"]
    lines += [f"{u},{i},{t},{about[int(i[1:])]}" for u, i, t in rows]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    (folder / "amazon").mkdir()
    reviews = [dict(user_id=u, parent_asin=i, timestamp=1000 * t) for u, i, t in rows]
    meta = [dict(parent_asin=f"i{n}", title=title) for n, title in about.items()]
    name = "Industrial_and_Scientific.jsonl"
    for path, objects in ((name, reviews), (f"meta_{name}", meta)):
        text = "".join(json.dumps(x) + "\n" for x in objects)
        (folder / "amazon" / path).write_text(text)
