"""What of a reply is not left to the model: joins the grammars of `text/` to the masks of `engine/`.

Owns the decision which replies are held to a grammar and which may not call tools, and where thoughts may come. Refuses to know
what grammars say and how they are applied. Read `text/grammar.py` and `engine/grammar_mask.py` next, `api.py` for who asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemcutter.engine.grammar_mask import GrammarMask, MarkerIds, Thoughts
from gemcutter.engine.request import Request
from gemcutter.errors import RequestError, spell_value
from gemcutter.text.grammar import Constraint, Grammar, build_grammar, function_of, may_call
from gemcutter.text.grammar_compiler import CompiledGrammar, GrammarCompiler, has_llguidance
from gemcutter.text.reply import CALL_CLOSE, CALL_OPEN, CHANNEL_CLOSE, CHANNEL_OPEN, HEADER, ends_in_reasoning
from gemcutter.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplyTerms:
    """What a caller asks of a reply; `choice` as `build_grammar` takes it. None of it is checked."""

    constraint: object = None
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: object = "auto"
    parallel: bool = True


def constrain(
    request: Request, terms: ReplyTerms, tokenizer: Tokenizer, grammars: GrammarCompiler, thinks: bool | None = None
) -> Request:
    """Return a request whose reply is held to terms; `thinks` says whether a conversation's reply may think, None of raw prompts.

    A reply to a conversation that may call no tool can't begin a call; raw prompts are left free. Calls are held to their
    declarations as well as they can where nothing insists on it. Raises RequestError for what can't be had.
    """
    if not (terms.constraint is None or isinstance(terms.constraint, Constraint)):
        raise RequestError(f"constraint: expected a Constraint, found {spell_value(terms.constraint)}")
    call_id = tokenizer.id_of(CALL_OPEN)
    calls = may_call(terms.choice, terms.tools)
    if not calls and terms.constraint is None:
        return _without_calls(request, call_id) if thinks is not None or terms.choice == "none" else request
    if calls and call_id is None:
        if not _insists(terms):
            return request
        raise RequestError(f"tool_choice: the vocabulary has no {CALL_OPEN}, which begins a call; leave the tools out")
    found = _grammar(request, terms, grammars)
    if found is None:
        return request
    grammar, compiled = found
    mask = GrammarMask(
        compiled.matcher,
        compiled.first,
        grammar.name,
        markers=_markers(tokenizer, request),
        thoughts=_thoughts(request, tokenizer, thinks),
        trigger=call_id if grammar.is_triggered else None,
        gives_way=not _insists(terms),
    )
    return replace(request, logits_processors=(*request.logits_processors, mask))  # the last one: what it forbids stays so


def _grammar(request: Request, terms: ReplyTerms, grammars: GrammarCompiler) -> tuple[Grammar, CompiledGrammar] | None:
    """Return the grammar of terms; None, or a RequestError if something insists on one, where there can't be one."""
    insists = _insists(terms)
    if not insists and not (has_llguidance() and request.stop_ids):
        return None
    if not request.stop_ids:
        raise RequestError("ignore_eos: a reply that is held to a grammar ends where the grammar does; leave ignore_eos out")
    constraint = terms.constraint if isinstance(terms.constraint, Constraint) else None
    try:
        grammar = build_grammar(constraint, terms.tools, terms.choice, parallel=terms.parallel)
        return None if grammar is None else (grammar, grammars.compile(grammar))
    except RequestError as error:
        if insists:
            raise
        log.warning("%s; calls are not held to their declarations", error)
        return None


def _insists(terms: ReplyTerms) -> bool:
    """Return whether a caller was promised a form: by a constraint, a call that must come, a choice of tools, a strict tool."""
    is_strict = any(function_of(tool).get("strict") is True for tool in terms.tools)
    return terms.constraint is not None or terms.choice != "auto" or is_strict


def _without_calls(request: Request, call_id: int | None) -> Request:
    """Return a request whose reply can't begin a call."""
    sampling = request.sampling
    if call_id is None or call_id in sampling.suppress:
        return request
    return replace(request, sampling=replace(sampling, suppress=(*sampling.suppress, call_id)))


def _markers(tokenizer: Tokenizer, request: Request) -> MarkerIds:
    id_of = tokenizer.id_of
    ends = frozenset(id for id in request.stop_ids if id < tokenizer.num_ids)  # callers may give ids that there are not
    name, special = tuple(tokenizer.encode_plain(HEADER)), tokenizer.special_ids | ends
    return MarkerIds(id_of(CHANNEL_OPEN), id_of(CHANNEL_CLOSE), name, id_of(CALL_CLOSE), special)


def _thoughts(request: Request, tokenizer: Tokenizer, thinks: bool | None) -> Thoughts:
    """Return where a reply may think. Where it does not, some models open a channel and close it, if the prompt has not."""
    if ends_in_reasoning(tokenizer, request.prompt):
        return Thoughts.OPEN
    if thinks is None or request.prompt[-1:] == (tokenizer.id_of(CHANNEL_CLOSE),):
        return Thoughts.NEVER
    return Thoughts.FREE if thinks else Thoughts.EMPTY
