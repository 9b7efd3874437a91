"""One chat completion of any OpenAI-compatible endpoint, with the library's retries; what went wrong, in words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .config import ConfigError
from .options import RewriteOptions

# the paper's description (arXiv:2509.10396, section 3.3), in our words: it does not print its own
INSTRUCTION = (
    "Rewrite the worked solution below so that it is short and structured. Keep every calculation that the answer "
    "needs, one per line, in order. Leave out reflection, backtracking, second thoughts, repetitions and restatements "
    "of the problem. Do not change the final answer. Use at most {budget} tokens. End with one line that holds only "
    "#### and the final answer."
)


class EndpointError(RuntimeError):
    """The endpoint refuses what every further request would ask too (key, model, address)."""


class RequestFailed(Exception):
    """One request failed after all retries."""


@dataclass(frozen=True)
class Reply:
    """text: of the model.   prompt_tokens, completion_tokens: as the endpoint counts them, 0 where it does not."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Client:
    """`await client.ask(question, solution, answer)`. Close it in the event loop it was used in.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(self, options: RewriteOptions) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ConfigError(
                "rewrite: base_url needs the openai package: pip install 'igpo[rewrite]'"
            ) from error
        self.library: Any = openai
        self.options = options
        self.client: Any = openai.AsyncOpenAI(
            base_url=options.base_url,
            # endpoints of one's own often want none, the library always does
            api_key=os.environ.get(options.api_key_env) or "none",
            max_retries=options.max_retries,
            timeout=options.request_timeout_s,
        )

    async def ask(self, question: str, solution: str, answer: str) -> Reply:
        """Raises EndpointError or RequestFailed. Retries (rate limits, time-outs, server errors) back off
        exponentially and honour Retry-After."""
        options, library = self.options, self.library
        instruction = INSTRUCTION.replace("{budget}", str(options.max_trace_length))
        content = (
            f"{instruction}\n\nProblem:\n{question}\n\nWorked solution:\n{solution}\n\nFinal answer: {answer}"
        )  # fmt: skip
        try:
            found = await self.client.chat.completions.create(
                model=options.rewrite_model,
                messages=[{"role": "user", "content": content}],
                temperature=options.rewrite_temperature,
                max_tokens=options.max_tokens,
            )
        except library.APIStatusError as error:
            message = f"rewrite: {options.base_url}: {error.message}"
            if error.status_code in (400, 401, 403, 404, 422):
                raise EndpointError(message) from error
            raise RequestFailed(message) from error
        except library.APIConnectionError as error:  # also time-outs
            raise RequestFailed(f"rewrite: {options.base_url}: {error.message}") from error
        usage = found.usage
        text = (found.choices[0].message.content or "") if found.choices else ""
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Reply(text, *counts)

    async def close(self) -> None:
        await self.client.close()
