"""The way of texts from the worker to the client: whole and streamed answers, in the form of a protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gptfast.generation import Request, Token
from gptfast.serving.choices import Choice, Form, Part, join, usage
from gptfast.serving.errors import worker_errors
from gptfast.serving.events import Events
from gptfast.serving.leaving import while_connected
from gptfast.serving.limits import Deadline
from gptfast.serving.protocol import ApiError, Sampling
from gptfast.serving.submission import Submission
from gptfast.serving.worker import Worker

EVENT_STREAM = "text/event-stream"


@dataclass
class Answer:
    """An answer that is being made.

    Args:
        ask: the request of the client.
        requests: those of the worker.
        choices: return sequences of the first request, then of the second, and so on.
        form: how the protocol writes it.
        deadline: when it must be complete.
        opening: parts before the first token.
        headers: of the response.
    """

    ask: Sampling
    requests: list[Request]
    choices: Sequence[Choice]
    form: Form
    deadline: Deadline
    opening: list[Part] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)

    async def respond(self, http: HTTPRequest, worker: Worker) -> Response:
        """Generate; the response is whole or a stream, as the client asks. Raises ApiError."""
        with worker_errors():
            submission = worker.submit(self.requests, streams=bool(self.ask.stream))
        if self.ask.stream:
            return SubmissionResponse(self._stream(submission, worker), worker, submission, self.headers)
        return await self._whole(http, submission, worker)

    def opening_alone(self) -> Response:
        """The response where no token is asked for."""
        used = usage(sum(len(request.prompt) for request in self.requests), 0)
        parts = [{**part, "finish_reason": "length"} for part in self.opening]
        if self.ask.stream:
            events = self._events()
            return Response(events.parts(parts) + events.end(used), media_type=EVENT_STREAM)
        choices = [self.form.choice(part) for part in parts]
        return JSONResponse({**self.form.envelope(self.ask.model), "choices": choices, "usage": used})

    def _events(self) -> Events:
        return Events(self.ask.stream_options, self.form, self.ask.model)

    async def _parts(self, submission: Submission, worker: Worker) -> AsyncIterator[list[Part]]:
        """The parts of all choices as they are generated; events that arrive together become one part per choice."""
        first: dict[Request, int] = {}
        for request in submission.requests:
            first[request] = sum(known.config.num_return_sequences for known in first)
        async for events in submission.events(self.deadline.left, worker.pause):
            by_choice: dict[int, list[Part]] = {}
            for event in events:
                if isinstance(event, Token):
                    index = first[event.request] + event.index
                    by_choice.setdefault(index, []).append(self.choices[index].push(event))
                elif isinstance(event, Request):
                    for sequence in event.sequences:
                        index = first[event] + sequence.index
                        by_choice.setdefault(index, []).append(self.choices[index].finish(sequence.finish))
            yield [join(parts) for parts in by_choice.values()]

    async def _whole(self, http: HTTPRequest, submission: Submission, worker: Worker) -> Response:
        async def collect() -> list[Part]:
            by_choice: list[list[Part]] = [[] for _ in self.choices]
            for part in self.opening:
                by_choice[part["index"]].append(part)
            async for parts in self._parts(submission, worker):
                for part in parts:
                    by_choice[part["index"]].append(part)
            return [join(parts) for parts in by_choice]

        try:
            with worker_errors():
                joined = await while_connected(http, collect())
        finally:
            worker.cancel(submission)
        choices = [self.form.choice(part) for part in joined]
        body = {**self.form.envelope(self.ask.model), "choices": choices, "usage": _usage(submission)}
        return JSONResponse(body, headers=dict(self.headers))

    async def _stream(self, submission: Submission, worker: Worker) -> AsyncIterator[bytes]:
        """The server-sent events of a streamed answer."""
        events = self._events()
        try:
            with worker_errors():
                if self.opening:
                    yield events.parts(self.opening)
                async for parts in self._parts(submission, worker):
                    if data := events.parts([p for p in parts if p["text"] or p["logprobs"] or p["finish_reason"]]):
                        yield data
        except ApiError as error:
            yield events.error(error)
            return
        yield events.end(_usage(submission))


class SubmissionResponse(StreamingResponse):
    """A streamed response that cancels its requests when it ends, also when the client leaves."""

    def __init__(
        self, events: AsyncIterator[bytes], worker: Worker, submission: Submission, headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type=EVENT_STREAM, headers=headers)
        self._worker, self._submission = worker, submission

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._submission)


def _usage(submission: Submission) -> dict[str, int]:
    made = sum(sequence.num_new for request in submission.requests for sequence in request.sequences)
    return usage(sum(len(request.prompt) for request in submission.requests), made)
