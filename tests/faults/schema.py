"""Bodies that the server's own OpenAPI description allows, for every endpoint that an ordinary client may ask."""

import json
from collections.abc import Iterator

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase, settings

# What controls the server, and has tests of its own.
CONTROL = ('/terminate', '/sleep', '/wakeup', '/update', '/abort', '/distserve', '/init_', '/destroy_')


def schema_bodies(url: str, model: str, count: int) -> list[tuple[str, bytes, str]]:
    """About ``count`` requests of the server at ``url``, the same ones every time: name, body and path."""
    found = schemathesis.openapi.from_url(f'{url}/openapi.json').get_all_operations()
    operations = [one.ok() for one in found]
    asked = [one for one in operations if one.method.upper() == 'POST' and not one.path.startswith(CONTROL)]
    return [body for one in asked for body in _bodies(one, model, -(-count // len(asked)))]


def _bodies(operation: schemathesis.schemas.APIOperation, model: str, count: int) -> Iterator[tuple[str, bytes, str]]:
    made: list[tuple[str, bytes, str]] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy())
    def make(case: schemathesis.Case) -> None:
        body = {**case.body, 'model': model} if isinstance(case.body, dict) and 'model' in case.body else case.body
        text = json.dumps(body, default=repr)
        made.append((f'{operation.path} {len(made)}', text.encode('utf-8', 'surrogatepass'), operation.path))

    make()
    return iter(made)
