"""What travels with a message, without any collector."""

import structlog

from jobs import tracing


def known():
    return structlog.contextvars.get_contextvars()


def test_the_id_of_a_request_travels_with_its_message_into_the_log_lines_of_the_worker():
    with structlog.contextvars.bound_contextvars(request_id="r1"), tracing.sending("task", "queue") as headers:
        assert headers["request_id"] == "r1"
    assert known() == {}
    with tracing.working("task", headers):
        assert known() == {"request_id": "r1"}
    assert known() == {}


def test_a_message_without_headers_is_worked_on_all_the_same():
    with tracing.sending("task", "queue") as headers:
        assert headers == {}
    for nothing in (None, {}, {"traceparent": "nonsense"}):
        with tracing.working("task", nothing):
            assert known() == {}


def test_what_the_work_is_about_is_in_the_log_lines_until_its_end():
    with tracing.about(job_id="01J", chunk=3), tracing.within("encode", prompts=2):
        assert known() == {"job_id": "01J", "chunk": 3}
    assert known() == {}
