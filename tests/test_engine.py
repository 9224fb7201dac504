"""Continuous batching: answers equal those of `generate`, whatever other requests join or leave the batch."""

import random
import threading
import time

import pytest
import torch
from toys import aligned, base

from generate.engine import Engine
from generate.jobs import Event, Job, JobError
from lit_llama.bank import make_bank
from lit_llama.checkpoint import AdapterFile, save_base
from lit_llama.compose import LastUsed, load_with_bank
from lit_llama.generation import Sampling, cut_at_stop, generate
from lit_llama.live_text import LiveText, stop_test
from lit_llama.memory import _AliveBytes
from lit_llama.utils import UserError

ROWS = ["base", "a", "b", "c", "a:0.5+b", "c+b:-1.5", "a+base", "b:2", "c:0"]


def adapter(length: int, start: int, seed: int, style: str = "alpaca") -> AdapterFile:
    network = aligned(length, start, seed, vocab_size=300, padded_vocab_size=300)
    state = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    config = {"adapter_prompt_length": length, "adapter_start_layer": start}
    return AdapterFile(state, {"method": "aligner", "config": config, "prompt_style": style}, f"adapter {seed}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, network = tmp_path_factory.mktemp("base"), base(vocab_size=300, padded_vocab_size=310)
    save_base(path, network.config, network.state_dict())
    return path


@pytest.fixture
def model(folder):
    adapters = [("a", adapter(1, 1, seed=1)), ("b", adapter(3, 2, seed=2)), ("c", adapter(1, 2, seed=3))]
    return load_with_bank(folder, make_bank(folder, adapters))


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, max_batch=4)


class Client:
    """A request and the events that it received."""

    def __init__(self, engine: Engine, prompt: list[int], adapters: str, sampling: Sampling, **options) -> None:
        self.adapters, self.events, self.ended = adapters, [], threading.Event()
        self.job = Job(prompt, self.receive, engine.parse(adapters), sampling, **options)

    def receive(self, event: Event) -> None:
        self.events.append(event)
        if event.finish or event.error:
            assert not self.ended.is_set()
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def last(self) -> Event:
        return self.events[-1]


def run(engine: Engine, clients: list[Client], at: dict[int, list[Client]] | None = None) -> None:
    """Submit the clients, those of `at` before the given steps, and step until all have ended."""
    engine.submit([client.job for client in clients])
    step = 0
    while engine.rows or engine.waiting or (at and max(at) >= step):
        if at and step in at:
            engine.submit([client.job for client in at[step]])
        engine.step()
        assert len(engine.rows) <= engine.max_batch
        step += 1


def expected(engine: Engine, client: Client) -> str:
    """Return the answer of `generate` to the request alone, in the form of `lit_llama.generation.answer`."""
    job, decode, context = client.job, engine.tokenizer.decode, client.job.prompt[-8:]

    def finished(ids: list[int]) -> bool:
        return bool(job.stop) and cut_at_stop(decode(ids), job.stop)[1]

    with engine.model.using([job.adapters]):
        (ids,) = generate(engine.model, [job.prompt], job.sampling, engine.tokenizer.stop_ids, finished, [job.row])
    if not job.strip:
        return cut_at_stop(decode(context + ids)[len(decode(context)) :], job.stop)[0]
    return cut_at_stop(decode(ids), job.stop)[0].strip()


def test_a_prompt_has_at_most_max_length_tokens_with_its_answer(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch=4, max_length=20)
    with pytest.raises(JobError, match=r"The prompt has 20 tokens; with its answer it may have 20\."):
        engine.submit([Client(engine, [5] * 20, "a", Sampling(30)).job])
    client = Client(engine, [5] * 15, "a", Sampling(30))
    run(engine, [client])
    assert (client.last.finish, engine.counts["new_tokens"]) == ("length", 5)


def test_prompts_that_join_together_fit_into_the_limit_with_their_padding(engine):
    engine.prefill_tokens = 40
    clients = [Client(engine, [5] * n, "a", Sampling(30)) for n in (20, 20, 2, 2)]
    engine.submit([client.job for client in clients])
    engine.step()
    assert len(engine.rows) == 2  # a third row would be padded to 20 tokens, too
    engine.step()
    assert len(engine.rows) == 4


def requests(engine: Engine, count: int, seed: int = 0) -> list[Client]:
    rng, clients = random.Random(seed), []
    for i in range(count):
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, 30))]
        sampling = rng.choice(
            [
                Sampling(rng.randint(1, 30)),
                Sampling(rng.randint(1, 30), temperature=0.8, seed=i),
                Sampling(20, temperature=1.2, top_k=20, seed=i),
                Sampling(64, temperature=1.0, top_p=0.8, seed=i),
            ]
        )
        stop = rng.choice([(), (), ("a",), ("th", "e ")])
        clients.append(Client(engine, prompt, ROWS[i % len(ROWS)], sampling, row=i % 3, stop=stop))
    return clients


def test_answers_equal_those_of_generate_whenever_requests_join(engine):
    clients = requests(engine, 18)
    for i, client in enumerate(clients):
        client.job.streams, client.job.strip = i % 2 == 0, i % 3 > 0
    run(engine, clients[:5], {2: clients[5:6], 3: clients[6:11], 30: clients[11:]})
    engine.model.use([None])
    for client in clients:
        assert client.text == expected(engine, client), client.adapters
        assert client.last.finish in ("stop", "length")
    assert len({client.text for client in clients}) > 14
    assert engine.counts["requests"] == engine.counts["stop"] + engine.counts["length"] == 18


def test_requests_join_at_the_next_token_and_leave_when_done(engine):
    first, second, third = (Client(engine, [5, 6, 7], "a", Sampling(n)) for n in (6, 2, 3))
    engine.submit([first.job])
    engine.step()
    assert [row.job for row in engine.rows] == [first.job] and first.job.n_new == 2  # prefill and one step
    engine.submit([second.job, third.job])
    engine.step()
    assert (first.job.n_new, second.job.n_new, third.job.n_new) == (3, 2, 2) and second.ended.is_set()
    engine.step()
    assert [row.job for row in engine.rows] == [first.job, third.job] and third.ended.is_set()
    run(engine, [])
    assert engine.rows == [] and first.ended.is_set()


def test_the_bank_may_change_while_prefixes_are_projected(engine, monkeypatch):
    prompt, sampling, attn = list(range(40, 60)), Sampling(20), engine.model.transformer.h[-1].attn
    clients = [Client(engine, prompt, name, sampling) for name in ("a", "b", "a+c:0.5")]
    before = [expected(engine, client) for client in clients]
    engine.model.projected = LastUsed()
    project = attn.keys_values

    def change() -> None:
        with engine.changed:
            engine.bank.swap("a", adapter(1, 1, seed=9))
            engine.bank.remove("b")
            engine.bank.add("d", adapter(3, 2, seed=8))  # takes the place of b

    def change_and_project(x):
        if "b" in engine.bank:
            thread = threading.Thread(target=change, daemon=True)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
        return project(x)

    with monkeypatch.context() as patch:
        patch.setattr(attn, "keys_values", change_and_project)
        run(engine, clients)
    assert [client.text for client in clients] == before and list(engine.bank) == ["a", "c", "d"]
    later = [Client(engine, prompt, name, sampling) for name in ("a", "d")]
    run(engine, later)
    engine.model.use([None])
    assert [client.text for client in later] == [expected(engine, client) for client in later] != before[:2]


def test_when_a_row_leaves_the_former_batch_of_prefixes_is_freed_first(engine):
    for i in range(3):
        engine.bank.add(f"long {i}", adapter(400, 1, seed=i))
    clients = [Client(engine, [5, 6, 7], f"long {i}", Sampling(9)) for i in range(3)]
    with _AliveBytes(engine.model) as counter:
        engine.submit([client.job for client in clients])
        engine.step()
        ((keys, values),) = engine.rows[2].terms
        clients[0].job.cancelled = True
        before = counter.peak = counter.alive
        engine.step()
    assert len(engine.rows) == 2
    assert counter.peak - before < (keys.nbytes + values.nbytes) / 2


def test_running_requests_keep_their_adapter_and_later_ones_get_the_new_one(engine):
    sampling, prompt = Sampling(20), list(range(40, 60))
    running, waiting, removed = (Client(engine, prompt, name, sampling) for name in ("a", "a", "c"))
    before = expected(engine, running)
    engine.submit([running.job])
    engine.step()
    engine.submit([waiting.job, removed.job])
    engine.bank.swap("a", adapter(2, 1, seed=9))
    engine.bank.remove("c")
    engine.bank.add("new", adapter(1, 1, seed=4))
    added = Client(engine, prompt, "new", sampling)
    run(engine, [added])
    engine.model.use([None])
    assert running.text == before != waiting.text
    assert waiting.text == expected(engine, waiting) and added.text == expected(engine, added)
    assert isinstance(removed.last.error, UserError) and "'c'" in str(removed.last.error)
    with pytest.raises(UserError, match="'c'"):
        engine.parse("a+c")


def test_a_prompt_in_the_style_of_an_adapter_is_not_answered_by_one_of_another_style(engine):
    sums = ("a", "b+a", "b", "base", "a")
    clients = [Client(engine, [5, 6], text, Sampling(5), style="alpaca") for text in sums[:4]]
    clients.append(Client(engine, [5, 6], sums[4], Sampling(5)))  # a prompt in no style
    engine.submit([client.job for client in clients])
    engine.bank.swap("a", adapter(1, 1, seed=9, style="hh"))
    engine.bank.swap("b", adapter(1, 1, seed=8))
    run(engine, [])
    assert "The adapter 'a' now has another prompt style" in str(clients[0].last.error)
    assert all(client.last.finish for client in clients[1:])


def test_log_probabilities_match_the_model(engine):
    client = Client(engine, [9, 8, 7], "a+b:0.5", Sampling(12, temperature=1.0, top_k=5), strip=False, n_top=2)
    plain = Client(engine, [9, 8, 7], "a+b:0.5", Sampling(12, temperature=1.0, top_k=5), strip=False, streams=True)
    run(engine, [client, plain])
    tokens = client.last.tokens
    assert "".join(token.text for token in tokens) == client.text == plain.text
    assert all(token.start == len("".join(t.text for t in tokens[:i])) for i, token in enumerate(tokens))
    with engine.model.using([client.job.adapters]):
        (ids,) = generate(engine.model, [[9, 8, 7]], client.job.sampling, engine.tokenizer.stop_ids)
        with torch.no_grad():
            logps = engine.model(torch.tensor([[9, 8, 7, *ids]]))[0, :, :300].log_softmax(-1)
    for i, (token, id) in enumerate(zip(tokens, ids, strict=False)):
        assert token.logp == pytest.approx(logps[2 + i, id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(logps[2 + i].topk(2).values.tolist(), abs=1e-4)


def test_cancelled_and_late_requests_free_their_rows(engine):
    cancelled, late, waiting, other = (Client(engine, [5, 6], "a", Sampling(50)) for _ in range(4))
    late.job.seconds = 0.0
    engine.submit([cancelled.job, other.job])
    engine.step()
    engine.submit([late.job, waiting.job])
    for client in (cancelled, waiting):
        client.job.cancelled = True
    engine.step()
    assert [row.job for row in engine.rows] == [other.job] and not engine.waiting
    assert late.last.error.code == "timeout" and not waiting.events
    run(engine, [])
    assert other.text == expected(engine, other)
    assert (engine.counts["cancelled"], engine.counts["failed"]) == (2, 1)


def test_a_request_that_cannot_be_answered_is_refused_at_once(engine):
    with pytest.raises(UserError, match="no tokens"):
        engine.submit([Client(engine, [], "a", Sampling()).job])
    with pytest.raises(UserError, match="64"):
        engine.submit([Client(engine, [5] * 64, "a", Sampling()).job])
    engine.max_waiting = 2
    jobs = [Client(engine, [5], "a", Sampling()).job for _ in range(3)]
    with pytest.raises(UserError, match="asks for 3 answers, and at most 2 may wait"):
        engine.submit(jobs)
    assert not engine.waiting
    engine.submit(jobs[:1])
    with pytest.raises(JobError, match="room for 1 of 2 answers, and the request asks for 2"):
        engine.submit(jobs[1:])
    assert list(engine.waiting) == jobs[:1]
    jobs[0].cancelled = True
    longest = Client(engine, [5] * 63, "base", Sampling(9))
    run(engine, [longest])
    assert longest.job.n_new <= 1


@pytest.mark.parametrize("where", ["_set_terms", "_prefill"])
def test_the_engine_stops_if_the_gpu_has_failed(engine, monkeypatch, where, capsys):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, where, fail)
    engine.start()
    client = Client(engine, [5, 6], "a", Sampling(50))
    engine.submit([client.job])
    assert client.ended.wait(60) and client.last.error.code == "server_error"
    engine.thread.join(60)
    assert not engine.is_alive and capsys.readouterr().err.count("Traceback") == 1
    with pytest.raises(JobError, match="The GPU has failed; restart the server") as error:
        engine.submit([client.job])
    assert error.value.code == "server_error" and str(client.last.error) == str(error.value)
    engine.stop()


def test_the_engine_thread_survives_an_error_and_stops(engine, monkeypatch, capsys):
    engine.start()
    clients = requests(engine, 7)
    for client in clients:
        engine.submit([client.job])
    assert all(client.ended.wait(60) for client in clients)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_set_terms", lambda: 1 / 0)
        broken = Client(engine, [5, 6], "a", Sampling(50))
        engine.submit([broken.job])
        assert broken.ended.wait(60) and "log" in str(broken.last.error) and broken.last.error.code == "server_error"
        assert "ZeroDivisionError" in capsys.readouterr().err
    after = Client(engine, [5, 6], "a", Sampling(5))
    engine.submit([after.job])
    assert after.ended.wait(60) and after.last.finish
    endless = Client(engine, [5, 6], "a", Sampling(50))
    engine.submit([endless.job])
    engine.stop()
    assert not engine.is_alive
    assert endless.last.error.code == "shutting_down"
    with pytest.raises(JobError, match="shutting down"):
        engine.submit([after.job])
    engine.model.use([None])
    for client in clients:
        assert client.text == expected(engine, client)


@pytest.mark.parametrize("name", ["using", "_take_terms", "_append"])
def test_only_requests_that_cannot_join_fail(engine, monkeypatch, capsys, name):
    running, joining, later = (Client(engine, [5, 6, 7], text, Sampling(20)) for text in ("a", "b", "a+b"))
    engine.submit([running.job])
    engine.step()
    engine.submit([joining.job])
    with monkeypatch.context() as patch:

        def fail_once(*args):
            patch.undo()
            raise MemoryError

        patch.setattr(engine.model if name == "using" else engine, name, fail_once)
        engine.step()
    assert "log" in str(joining.last.error) and "MemoryError" in capsys.readouterr().err
    assert [row.job for row in engine.rows] == [running.job] and not engine.waiting
    run(engine, [later])
    engine.model.use([None])
    for client in (running, later):
        assert client.text == expected(engine, client) and client.last.finish


@pytest.mark.parametrize("seed", range(3))
def test_live_text_is_the_decoded_text(tokenizer, seed):
    rng = random.Random(seed)
    prompt = [tokenizer.bos_id, *tokenizer.encode("what did the cat")]
    words = [tokenizer.encode(word) for word in (" é", " the cat", "日本", " 🙂", "\n", "  a")]
    for _ in range(50):
        # also tokens without text: those for the beginning and the end, and one beyond the vocabulary
        ids = [i for _ in range(rng.randint(0, 8)) for i in rng.choice([*words, [rng.randrange(301)], [1], [2]])]
        text, pieces = LiveText(tokenizer, prompt), []
        for token in ids:
            text.push(token)
            pieces.append(text.take())
        pieces.append(text.take(last=True))
        assert "".join(pieces) == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_text_is_noticed_at_the_token_that_completes_it(tokenizer, seed):
    rng = random.Random(seed)
    words = [tokenizer.encode(word) for word in (" é", " the cat", "日本", "###", "# In", "st", "\n", "  a")]
    for stop in ((), ("### Inst",), ("日本日", "a\n"), (" é é", "t the")):
        finished = stop_test(tokenizer, stop)
        for _ in range(30):
            ids = [i for _ in range(60) for i in rng.choice([*words, [rng.randrange(3, 300)]])]
            for n in range(1, len(ids) + 1):
                expected = cut_at_stop(tokenizer.decode(ids[:n]), stop)[1]
                assert finished(ids[:n]) == expected, (stop, ids[:n])
                if expected:
                    break


def test_live_text_stops_and_strips(tokenizer):
    def pieces(answer: str, *stop: str) -> list[str]:
        text, parts = LiveText(tokenizer, [tokenizer.bos_id], stop, strip=True), []
        for token in tokenizer.encode(answer):
            text.push(token)
            parts.append(text.take(text.stopped))
            if text.stopped:
                return parts
        return [*parts, text.take(last=True)]

    assert "".join(pieces("  the cat \n ")) == "the cat"
    assert "".join(pieces("the cat ### Instruction", "### Inst")) == "the cat"
    assert "".join(pieces("the cat ###", "### Inst")) == "the cat ###"
    assert not any("#" in piece for piece in pieces("the cat ### Instruction", "### Inst"))


def test_an_idle_engine_uses_little_cpu_time(engine):
    engine.start()
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.2
    engine.stop()


def test_an_overflow_ends_its_request_and_affects_no_other(engine):
    long, short = list(range(50, 90)), [5, 6, 7]
    clients = [Client(engine, long, "a:1e39", Sampling(9)) for _ in range(3)]
    clients += [Client(engine, short, "b", Sampling(40))]
    run(engine, clients)
    assert all("overflow" in str(client.last.error) for client in clients[:3])
    later = [Client(engine, prompt, "b", Sampling(9)) for prompt in (short, [8, 9], long)]
    run(engine, later)  # in the same rows; because of the long prompt, the others read past their own length
    engine.model.use([None])
    for client in [clients[3], *later]:
        assert client.text == expected(engine, client) and client.last.finish
