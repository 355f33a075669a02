"""What a worker says and hears: a line of JSON for each, on its standard streams.

A request is {"prompt": token ids, "new_tokens": count}. The answer is {"first_s": seconds from the
request to the first token, "rest_s": from there to the last, "tokens": the greedy tokens}.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence

__all__ = ["serve"]


# Taken when this is imported: what libraries print from then on goes to standard error.
_replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(answer: Callable[[Sequence[int], int], tuple[float, float, Sequence[int]]]) -> None:
    """Answers requests until the input ends."""
    print(json.dumps({"ready": True}), file=_replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        first_s, rest_s, tokens = answer(request["prompt"], request["new_tokens"])
        reply = {"first_s": first_s, "rest_s": rest_s, "tokens": [int(token) for token in tokens]}
        print(json.dumps(reply), file=_replies, flush=True)
