"""A run on the hub: what a local stand-in of its API is sent, loaded from there, and what a refusal looks like."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from asyppo import push_to_hub
from asyppo.cli.main import main
from asyppo.config import ConfigError
from asyppo.publish import PublishError, write_repository


class Hub(ThreadingHTTPServer):
    """The four calls of an upload, as https://huggingface.co/docs/hub/api has them; files are kept in a folder."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.created, self.tokens = folder, [], set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            repository = json.loads(body)
            if repository["organization"] == "somebody-else":
                return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
            self.server.created.append(repository)
            return self._send(200, {"url": f"{self.server.url}/{repository['organization']}/{repository['name']}"})
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._send(200, {"files": files})
        assert self.path == "/api/models/me/my-policy/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.server.folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        place = {"commitUrl": f"{self.server.url}/me/my-policy/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        return self._send(200, place)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tiny_config: Callable[..., Any], tiny_trainer: Callable[..., Any]) -> Path:
    """The directory of a run of two steps."""
    config = tiny_config(max_steps=2)
    return tiny_trainer(config, lambda completions, **_: [float(len(c) % 2) for c in completions]).train().run.path


def visibility(created: dict[str, Any]) -> str:
    """Versions of huggingface_hub before 2 say ``private``."""
    return created.get("visibility", "private" if created.get("private") else "public")


def test_policy_and_critics_are_loaded_from_where_they_were_pushed(hub: Hub, run: Path) -> None:
    address = push_to_hub(run, "me/my-policy", api=HfApi(endpoint=hub.url, token="hf_secret"))
    assert address == f"{hub.url}/me/my-policy/commit/abc"
    [created] = hub.created
    assert (created["organization"], created["name"], visibility(created)) == ("me", "my-policy", "private")
    assert hub.tokens == {"Bearer hf_secret"}

    checkpoint = run / "checkpoint-2"
    pairs = [
        (AutoModelForCausalLM, checkpoint / "policy", {}),
        (AutoModelForTokenClassification, checkpoint / "critic_0", {"subfolder": "critic_0"}),
        (AutoModelForTokenClassification, checkpoint / "critic_1", {"subfolder": "critic_1"}),
    ]
    for kind, trained, place in pairs:
        there, here = kind.from_pretrained(hub.folder, **place).state_dict(), kind.from_pretrained(trained).state_dict()
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], x) for name, x in here.items())
    assert AutoTokenizer.from_pretrained(hub.folder).get_vocab()
    assert not list(hub.folder.rglob("*.distcp"))  # the optimizers stay

    card = (hub.folder / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    settings = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(settings) == yaml.safe_load((run / "config.yaml").read_text())
    rewards = [json.loads(line)["critic/score/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"| mean reward | {rewards[0]:.4f} (step 1) | {rewards[-1]:.4f} (step 2) |" in text
    assert f"- torch {torch.__version__}" in text
    assert "Step 2 of a run of `asyppo`" in text
    assert "![" in text
    assert (hub.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main(["push", str(run / "checkpoint-2"), "--to", "me/my-policy", "--public"]) == 0
    assert capsys.readouterr().out == f"pushed: {hub.url}/me/my-policy/commit/abc\n"
    assert visibility(hub.created[0]) == "public"
    assert main(["push", str(run), "--to", "me/my-policy", "--folder", str(tmp_path / "folder")]) == 0
    written = {path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*") if path.is_file()}
    assert written == {path.relative_to(hub.folder) for path in hub.folder.rglob("*") if path.is_file()}
    assert main(["push", str(run), "--to", "somebody-else/my-policy"]) == 1
    assert "asyppo: error: somebody-else/my-policy: " in capsys.readouterr().err
    assert main(["push", str(run), "--to", "not a name"]) == 2
    assert "repo_id: got 'not a name': " in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_pushed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"me/x: "):
        push_to_hub(run, "me/x", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_secret"))  # nobody is there
    with pytest.raises(ConfigError, match=r"run: got .*, needs a run's directory that has a checkpoint"):
        write_repository(tmp_path, tmp_path / "out", "me/x")
    with pytest.raises(ConfigError, match="has no held-out accuracy to choose by"):
        write_repository(run, tmp_path / "out", "me/x", best=True)
    weights = run / "checkpoint-2" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"checkpoint-2: .*model\.safetensors.*, needs a checkpoint"):
        push_to_hub(run, "me/x")
