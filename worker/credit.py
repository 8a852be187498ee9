"""Gives a consumer its credit back for a message whose answer does not reach the broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from kombu.transport import virtual


class CreditBack(bootsteps.StartStopStep):
    """A step of a consumer, each time that it has connected.

    A consumer takes as many messages as it has slots, and more once these are acknowledged or rejected. kombu 5.7 does
    not count a message as answered if the broker cannot be told so. If all slots are taken when the broker goes away,
    nothing is being read from it either, so the consumer would not notice, and never take a message again.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:  # noqa: ANN401 - Celery's consumer, of which its stubs know little
        """Wrap how the messages of this connection are answered."""
        qos = consumer.task_consumer.channel.qos
        qos.ack = _counted(qos, qos.ack)
        qos.reject = _counted(qos, qos.reject)


def _counted(qos: virtual.QoS, answer: Callable[..., None]) -> Callable[..., None]:
    def counted(delivery_tag: str, *args: object, **options: object) -> None:
        try:
            answer(delivery_tag, *args, **options)
        except Exception:
            # What kombu's own method for Redis does last; that the broker keeps the message costs a second delivery.
            virtual.QoS.ack(qos, delivery_tag)
            raise

    return counted
