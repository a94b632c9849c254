"""The process that vLLM runs in: ``python -P worker.py FD`` is the other side of ``EngineProcess``.

It is run as a file and imports vLLM and the standard library alone, so that its interpreter may be one of an
environment of its own. It ends when its parent does.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

Drawn = list[list[tuple[list[int], list[float]]]]
"""Of each prompt its responses: tokens, and the log-prob of each."""


def generate(engine: Any, prompts: list[list[int]], samplings: list[dict[str, Any]]) -> Drawn:
    """Return what ``engine`` draws after each of the ``prompts``, by the SamplingParams beside it."""
    from vllm import RequestOutput, SamplingParams

    answers: list[RequestOutput] = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**sampling) for sampling in samplings],
        use_tqdm=False,
    )
    return [
        [
            (list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)])
            for one in sorted(answer.outputs, key=lambda one: one.index)
        ]
        for answer in answers
    ]


def reload(engine: Any, directory: str) -> None:
    """Take the weights in ``directory``, and forget what was computed with those before."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": directory})
    forget(engine)


def forget(engine: Any) -> None:
    """Empty the cache of prefixes."""
    if not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be reset, since requests were under way")


def sleep(engine: Any, level: int) -> None:
    """Give back the memory of the cache, and of the weights: by keeping them on the host (1) or not at all (2)."""
    engine.sleep(level=level)


def wake(engine: Any, tags: list[str]) -> None:
    """Take back the memory of ``weights`` or ``kv_cache``."""
    engine.wake_up(tags=tags)


METHODS = {function.__name__: function for function in (generate, reload, sleep, wake)}


def serve(connection: Connection) -> NoReturn:
    """Start vLLM with the arguments that come first, and answer calls until the other side is gone."""
    arguments, directory = connection.recv()
    threading.Thread(target=_leave_without, args=[os.getppid(), directory], daemon=True).start()
    try:
        from vllm import LLM

        engine = LLM(**arguments)
        connection.send((True, None))
        while True:
            method, values = connection.recv()
            connection.send((True, METHODS[method](engine, **values)))
    except EOFError:
        engine.llm_engine.engine_core.shutdown()
        _leave(directory, 0)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        with suppress(OSError):  # it may be because nobody listens any more
            connection.send((False, " ".join(f"{type(error).__name__}: {error}".split())))
        _leave(directory, 1)


def _leave_without(parent: int, directory: str) -> None:
    """End this process, and those that it started, when its parent is gone, even while vLLM is computing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _leave(directory: str, status: int) -> NoReturn:
    shutil.rmtree(directory, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: threads of vLLM's would hold up an orderly end


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
