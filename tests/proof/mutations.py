"""Bugs sown into copies of the control plane: each compiles, and each must be caught.

A bug replaces one piece of text, which must be there exactly once: when the code has moved on, the
bug is to be sown anew, or replaced by one that is as subtle.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUGS", "Bug", "MovedOn", "sow"]


class MovedOn(Exception):
    """The text a bug replaces is not in the source exactly once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """What is wrong, and how it is made wrong: `old` becomes `new` in `file`."""

    what: str
    file: str
    old: str
    new: str


BUGS = (
    Bug(
        what="an aborted step forgets the page it grew",
        file="requests.cpp",
        old="    if (request.spare) store.pages.give(std::move(*request.spare));\n",
        new="",
    ),
    Bug(
        what="a cancelled ticket keeps the cached pages",
        file="requests.cpp",
        old="    store.index.release(std::move(ticket.cached_));\n",
        new="",
    ),
    Bug(
        what="a doomed request keeps its slot",
        file="requests.cpp",
        old="    store.slots.give(std::move(request.slot));\n    return Finished{request.id",
        new="    return Finished{request.id",
    ),
    Bug(
        what="a page grown in vain is lost when its request rests",
        file="requests.cpp",
        old="        tail.emplace(open(std::move(*request.spare)));\n",
        new="",
    ),
    Bug(
        what="a page takes one token too many",
        file="requests.cpp",
        old="(index + 1) * page_size > static_cast<std::size_t>(written.value)",
        new="(index + 1) * page_size > static_cast<std::size_t>(written.value) + 1",
    ),
    Bug(
        what="a lease counts as over one step early",
        file="steps.h",
        old="return step <= step_;",
        new="return step.value <= step_.value + 1;",
    ),
    Bug(
        what="a lease does not move on with the step that writes its page",
        file="requests.cpp",
        old="if (lease.until() < step) lease = extend(std::move(lease), step);",
        new="static_cast<void>(lease);",
    ),
    Bug(
        what="a doomed request returns its pages when its first step retires, not its last",
        file="requests.cpp",
        old="if (!done.covers(request.last)) return Ended(std::move(request));",
        new="if (!done.covers(request.lent.front().until())) return Ended(std::move(request));",
    ),
    Bug(
        what="a duplicate page is freed while a step reads it",
        file="requests.cpp",
        old="        if (flies_on) {\n            request.replaced",
        new="        if (false) {\n            request.replaced",
    ),
    Bug(
        what="the page table is not told of a duplicate's replacement",
        file="requests.cpp",
        old="swaps.push_back({static_cast<std::int32_t>(index), request.sealed.back().id()});",
        new="static_cast<void>(swaps);",
    ),
    Bug(
        what="a prompt that is cached whole leaves no token to compute",
        file="requests.cpp",
        old="const std::size_t reusable = (request.tokens().size() - 1) /",
        new="const std::size_t reusable = request.tokens().size() /",
    ),
    Bug(
        what="an admission promises one page too few at the edge of a page",
        file="ids.h",
        old="return PageCount((tokens.value + page_size.value - 1) / page_size.value);",
        new="return PageCount((tokens.value + page_size.value - 2) / page_size.value);",
    ),
    Bug(
        what="an admission promises one page too many at the edge of a page",
        file="ids.h",
        old="return PageCount((tokens.value + page_size.value - 1) / page_size.value);",
        new="return PageCount((tokens.value + page_size.value) / page_size.value);",
    ),
    Bug(
        what="a request that can never fit is let in",
        file="policy.h",
        old="request.known() + TokenCount(1)",
        new="request.known() - TokenCount(1)",
    ),
    Bug(
        what="a request is retracted again and again without progress",
        file="policy.h",
        old="return request.retractions() == 0 || request.progressed();",
        new="return request.retractions() >= 0;",
    ),
    Bug(
        what="a stop token counts before min_new_tokens",
        file="requests.cpp",
        old="outputs() > clamp(wish_.min_new_tokens)",
        new="outputs() >= clamp(wish_.min_new_tokens)",
    ),
    Bug(
        what="a request's output forgets what is in flight and runs too long",
        file="planning.cpp",
        old="!request.request->exhausted(request.pending, context_max_)",
        new="!request.request->exhausted(TokenCount(0), context_max_)",
    ),
    Bug(
        what="the salt is ignored",
        file="scheduler.cpp",
        old="    Queued queued(RequestBox(",
        new="    wish.salt = 0;\n    Queued queued(RequestBox(",
    ),
    Bug(
        what="who came last goes first",
        file="scheduler.cpp",
        old="const Order order{wish.priority, arrivals_seen_};",
        new="const Order order{wish.priority, -arrivals_seen_};",
    ),
    Bug(
        what="an admitted request takes the wrong place among the running",
        file="planning.cpp",
        old="running(other).order() > request.request->order()",
        new="running(other).order() < request.request->order()",
    ),
    Bug(
        what="the head of the queue is not woken when exactly the room it wants is free",
        file="planning.cpp",
        old="blocked_->wanted + reserve > store_.available()",
        new="blocked_->wanted + reserve >= store_.available()",
    ),
    Bug(
        what="a request that waits is never woken after a step went short of pages",
        file="planning.cpp",
        old="    starved_ = false;\n    resting_.reset();\n",
        new="    resting_.reset();\n",
    ),
    Bug(
        what="a new page of an output is not told to the page table",
        file="planning.cpp",
        old="if (offset == TokenCount(0)) table_.add",
        new="if (offset == TokenCount(0) && !decodes) table_.add",
    ),
    Bug(
        what="a retracted request is looked for in its old slot",
        file="planning.cpp",
        old="    places_.at(request.id().value).slot.reset();\n",
        new="",
    ),
    Bug(
        what="the token of a row that ended goes to the next row",
        file="scheduler.cpp",
        old="        if (row.samples) ++sample;",
        new="        if (row.samples && !doomed_.at(row.slot)) ++sample;",
    ),
    Bug(
        what="an aborted request that flies ends twice",
        file="scheduler.cpp",
        old="[&](Doomed&& request) { doomed_.put(on(Abort{}, std::move(request), store_)); }},\n",
        new="[&](Doomed&& request) { conclude(on(Abort{}, std::move(request), store_)); }},\n",
    ),
    Bug(
        what="one step more flies than may",
        file="steps.h",
        old="flying_max_(overlap_depth + 1)",
        new="flying_max_(overlap_depth + 2)",
    ),
    Bug(
        what="any step number is accepted",
        file="scheduler.cpp",
        old="if (flight.step != step) {",
        new="if (flight.step < step) {",
    ),
    Bug(
        what="an abort hits whoever has the id when it is applied",
        file="scheduler.cpp",
        old="if (found == places_.end() || found->second.order != aborted.order) return;",
        new="if (found == places_.end()) return;",
    ),
    Bug(
        what="an evictable page that is referred to again can still be evicted",
        file="prefix_index.cpp",
        old="        if (node.in_heap) heap_remove(page);\n",
        new="",
    ),
    Bug(
        what="the last but one reference frees a page",
        file="prefix_index.cpp",
        old="if (--node.references > 0) return;",
        new="if (--node.references > 1) return;",
    ),
    Bug(
        what="a page whose last child is evicted is never evicted",
        file="prefix_index.cpp",
        old="if (--parent.children == 0 && parent.references == 0) heap_push(*node.parent);",
        new="--parent.children;",
    ),
    Bug(
        what="a page is evicted while another continues it",
        file="prefix_index.cpp",
        old="    if (node.children == 0) heap_push(page);\n",
        new="    heap_push(page);\n",
    ),
    Bug(
        what="a page is sealed twice: equal content is not found",
        file="prefix_index.cpp",
        old="if (const auto known = find(content, before)) return",
        new="if (const auto known = find(content, before); known && !before) return",
    ),
    Bug(
        what="an entry is lost when its neighbour leaves the table",
        file="prefix_index.cpp",
        old="if (((place - wish) & mask) >= ((place - hole) & mask)) {",
        new="if (((place - wish) & mask) > ((place - hole) & mask)) {",
    ),
)


def sow(bug: Bug, control: Path, into: Path) -> Path:
    """Copies the control plane with the bug in it to a folder.

    Raises:
        MovedOn: the text to replace is not there exactly once.
    """
    for file in sorted(control.iterdir()):
        text = file.read_text()
        if file.name == bug.file:
            if text.count(bug.old) != 1:
                raise MovedOn(
                    f"{bug.what}: wanted once in {bug.file}, found {text.count(bug.old)} times: "
                    f"{bug.old!r}; sow it anew in tests/proof/mutations.py"
                )
            text = text.replace(bug.old, bug.new)
        target = into / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return into
