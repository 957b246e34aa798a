"""Runs README's own commands as a reader would: into an empty environment, from the built wheel, outside the checkout.

    python tests/readme_commands.py ENVIRONMENT WHEEL [REQUIREMENT ...]

The environment is made anew, and the code blocks of README.md run in their order. `pip install .` takes the wheel
instead of the checkout. Nothing is pinned but what README pins and the requirements given, such as
transformers==5.17.*. Answers are cut short. It ends with status 1 at the first command that fails, and at the first
that writes something on standard error which is not this package's: warnings of libraries do not reach the user.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import venv
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
NOT_RUN = (
    "make ",  # CI runs these themselves
    "domino-spec serve --engine vllm",  # needs a GPU's models; tests/engines boots vLLM
)
LONGEST_SECONDS = 1200
"""A command that takes longer has failed."""
SHORTER = {
    "generate": ["--max-new-tokens", "24"],
    "demo": ["--max-new-tokens", "16", "--prompt", "Why is the sky blue?"],
}
"""What is added to commands so that they take seconds."""
ORDINARY_MODEL = """
from transformers import AutoModelForCausalLM
from domino_spec.target.load import embedded_target_directory

model = AutoModelForCausalLM.from_pretrained(embedded_target_directory())
draft = load_draft("smollm2-135m-domino", model)
inputs = {**target.tokenizer("The sky is", return_tensors="pt"), "max_new_tokens": 16}
"""
"""What README takes for granted before it calls `model.generate`."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of a page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def console_commands(text: str) -> list[list[str]]:
    """The commands of a page's console blocks, split as a shell does."""
    lines = "".join(content for language, content in blocks(text) if language == "console").replace("\\\n", " ")
    return [words for line in lines.splitlines() if (words := shlex.split(line, comments=True))]


class Reader:
    """Someone who follows README in an environment of their own."""

    def __init__(self, environment: Path, wheel: Path, requirements: list[str], scratch: Path) -> None:
        self.wheel = wheel
        self.scratch = scratch
        constraints = scratch / "constraints.txt"
        constraints.write_text("".join(f"{requirement}\n" for requirement in requirements), encoding="utf-8")
        self.variables = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "DOMINO_SPEC_CACHE": str(scratch / "cache"),  # the target is converted anew
            "HF_HUB_OFFLINE": "1",
        }
        if requirements:
            self.variables["PIP_CONSTRAINT"] = str(constraints)

    def follow(self, page: str) -> None:
        """Run every console command, then the Python blocks as one program."""
        for words in console_commands(page):
            if not shlex.join(words).startswith(NOT_RUN):
                self.command(words)
        code = "".join(content for language, content in blocks(page) if language == "python")
        before, generate, after = code.partition("model.generate(")
        self.python(f"{before}{ORDINARY_MODEL}{generate}{after}".replace("max_new_tokens=256", "max_new_tokens=16"))

    def command(self, words: list[str]) -> None:
        """Run one command of README."""
        if words[:2] == ["pip", "install"]:
            words = [f"{self.wheel}{word[1:]}" if word == "." or word.startswith(".[") else word for word in words]
            self.run([*words, "-qq", "--disable-pip-version-check"], quiet=False)
        elif words[:2] == ["domino-spec", "serve"] and "--check" not in words:
            self.serve(words)
        else:
            self.run([*words, *SHORTER.get(words[1], [])], quiet=words[0] == "domino-spec")

    def python(self, code: str) -> None:
        """Run a program."""
        print(textwrap.indent(code, "    "), flush=True)
        self.run(["python", "-c", code], quiet=False)

    def run(self, words: list[str], quiet: bool) -> None:
        """Run a command to its end; a quiet one writes nothing on standard error that is not this package's."""
        print(f"$ {shlex.join(words)[:200]}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            words, cwd=self.scratch, env=self.variables, capture_output=True, text=True, timeout=LONGEST_SECONDS
        )
        print(f"{done.stdout}{done.stderr}[{time.monotonic() - began:.0f} s]\n", flush=True)
        foreign = [line for line in done.stderr.splitlines() if not line.startswith("domino-spec: ")]
        if done.returncode or (quiet and foreign):
            sys.exit(f"README's command failed (status {done.returncode}): {shlex.join(words)[:200]}")

    def serve(self, words: list[str]) -> None:
        """Start a server, ask for its models, and end it as Ctrl-C does."""
        words = [*words, "--port", "0"]
        print(f"$ {shlex.join(words)}", flush=True)
        with subprocess.Popen(words, cwd=self.scratch, env=self.variables, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            limit = threading.Timer(LONGEST_SECONDS, server.kill)
            limit.start()
            first = server.stdout.readline()
            limit.cancel()
            found = re.search(r"http://\S+", first)
            if found is None:
                server.kill()
                sys.exit(f"README's server did not start: {first}")
            with urllib.request.urlopen(f"{found[0]}/models", timeout=60) as answer:
                print(first, answer.read().decode(), "\n", flush=True)
            server.send_signal(signal.SIGINT)
            if server.wait(120):
                sys.exit(f"README's server ended with status {server.returncode}")


def main() -> None:
    """Make the environment and follow README."""
    environment, wheel, *requirements = sys.argv[1:]
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = Reader(Path(environment).resolve(), Path(wheel).resolve(), requirements, Path(scratch))
        reader.follow(README.read_text("utf-8"))
        reader.run(["pip", "list", "--disable-pip-version-check"], quiet=False)
    print("README's commands work")


if __name__ == "__main__":
    main()
