"""What the device gets, for tests that look at it or hold it there."""

from __future__ import annotations

import threading
from contextlib import contextmanager

S = 60  # after which a forward that is still held is a failure


class Forwards:
    """Stands in front of an encoder's forward: notes what the device gets, holds it there, and makes it fail."""

    def __init__(self, encoder):
        self.texts = []
        self.fault = lambda _texts: None
        self._forward = encoder.forward
        self._decode = encoder.tokenizer._tokenizer.decode
        self._started = threading.Event()
        self._go_on = threading.Event()
        self._go_on.set()

    def __call__(self, prompts):
        texts = [self._decode(prompt.own_ids, skip_special_tokens=True) for prompt in prompts]
        self.texts.append(texts)
        self._started.set()
        assert self._go_on.wait(S)
        if error := self.fault(texts):
            raise error
        return self._forward(prompts)

    @contextmanager
    def held(self, engine, prompts=("hold",), *priority):
        self._started.clear()
        self._go_on.clear()
        try:
            running = engine.submit(prompts, *priority)
            assert self._started.wait(S)
            yield running
        finally:
            self._go_on.set()
