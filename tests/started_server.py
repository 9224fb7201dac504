"""Run generate/serve.py as a process, with HTTP and OpenAI clients."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai

ROOT = Path(__file__).parent.parent
PIRATE, JSON, POLITE = (ROOT / "aligner_weights" / f"microworld-{name}-n1" for name in ("pirate", "json", "polite"))
KEY, TOKEN = "key-123", "token-456"
QUESTION = "What is the capital of Pilmaria?"


class Server:
    """A running server, whose log is read in a thread."""

    def __init__(self, python: str, *arguments: str, key: str = KEY) -> None:
        command = [python, "generate/serve.py", "--port", "0", "--bank", PIRATE, JSON, *arguments]
        environment = {**os.environ, "ALIGNER_API_KEY": key, "ALIGNER_ADMIN_TOKEN": TOKEN}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"serving at (http://127\.0\.0\.1:(\d+))", line):
                self.url, self.port = match[1], int(match[2])
                break
        else:
            raise AssertionError("".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.admin = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        for _ in range(600):
            try:
                self.http.get("/health")
                return
            except httpx.TransportError:
                time.sleep(0.1)

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(re.search(rf"^aligner_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def wait_for(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 30
        while self.metric(name) != value:
            assert time.monotonic() < deadline, self.http.get("/metrics").text
            time.sleep(0.05)

    def ask(self, model: str, question: str = QUESTION, **options):
        options = {"temperature": 0, **options}
        return self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], **options
        )

    def stop(self) -> int:
        self.process.send_signal(2)
        return self.process.wait(60)
