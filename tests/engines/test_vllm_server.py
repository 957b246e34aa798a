"""The demo pair behind vLLM's own server, started as a user starts it and asked by the `openai` client."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.error import URLError

import pytest

from domino_spec.draft.load import EMBEDDED_DRAFT, draft_directory
from domino_spec.settings import UserError
from domino_spec.target.load import embedded_target_directory

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(rf"^vllm:{name}_total{{[^}}]*}} (\S+)$", text, re.MULTILINE).group(1))


@pytest.mark.slow
def test_vllm_serves_the_demo_draft_to_the_openai_client(tmp_path):
    try:
        target = embedded_target_directory()
    except (UserError, ImportError) as error:
        pytest.skip(str(error))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculative = f'{{"method": "dflash", "model": "{draft_directory(EMBEDDED_DRAFT)}", "num_speculative_tokens": 8}}'
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", "--speculative-config", speculative]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path / "server.log"
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except URLError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        question = [{"role": "user", "content": "Count from 1 to 20."}]
        answer = client.chat.completions.create(model="demo", messages=question, temperature=0, max_tokens=48)
        drafts, accepted = (metric(url, f"spec_decode_num_{name}") for name in ("drafts", "accepted_tokens"))
    finally:
        server.terminate()
        server.wait(60)
    assert "3. 3\n4. 4\n5. 5" in answer.choices[0].message.content
    assert answer.usage.completion_tokens == 48
    assert 1 + accepted / drafts > 1.5
