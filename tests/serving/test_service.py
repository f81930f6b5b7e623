import asyncio
import threading
import time

import pytest
from fake_engine import EchoEngine

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.serving.service import EngineService, Failed, Full, Unavailable


def run(scenario, engine=None, **service):
    """Runs `scenario(service)` in an event loop, with a service that is ready and drained afterwards."""

    async def whole():
        served = EngineService(engine or EchoEngine, **service)
        served.start()
        await served.wait_started()
        try:
            return await scenario(served)
        finally:
            await served.drain(0)
            assert not served._thread.is_alive()

    return asyncio.run(asyncio.wait_for(whole(), 30))


async def tokens(job) -> dict[int, list[int]]:
    """All tokens of a job, by prompt."""
    found: dict[int, list[int]] = {}
    async with job:
        async for index, progress in job:
            found.setdefault(index, []).extend(progress.tokens)
    return found


async def until(condition, seconds=5.0):
    """Waits until a condition holds, and fails if it never does."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def params(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count)


def test_prompts_of_one_job_come_back_by_their_index():
    async def scenario(service):
        return await tokens(service.submit([([7, 8, 9], params(4)), ([10], params(2)), ([11, 12], params(3))]))

    assert run(scenario) == {0: [7, 8, 9, 7], 1: [10, 10], 2: [11, 12, 11]}


def test_many_jobs_at_once_do_not_mix():
    async def scenario(service):
        jobs = [service.submit([([7 + i], params(5))]) for i in range(50)]
        return await asyncio.gather(*map(tokens, jobs))

    assert run(scenario) == [{0: [7 + i] * 5} for i in range(50)]


def test_leaving_a_job_aborts_it_and_frees_its_pages():
    engine = EchoEngine(step_seconds=0.002, max_length=10**6)

    async def scenario(service):
        async with service.submit([([7], params(10**5)), ([8], params(10**5))]) as job:
            async for _ in job:
                break
        await until(lambda: service.open_prompts == 0)
        await until(lambda: engine.stats.free_pages == engine.stats.total_pages and not engine.requests)

    run(scenario, lambda: engine)


def test_a_job_that_is_left_before_the_engine_knew_of_it_never_gets_there():
    engine = EchoEngine(step_seconds=0.05, max_length=10**6)

    async def scenario(service):
        async with service.submit([([7], params(10**5))]):
            pass
        await until(lambda: service.open_prompts == 0)
        assert await tokens(service.submit([([8], params(1))])) == {0: [8]}
        assert engine.requests == []

    run(scenario, lambda: engine)


def test_one_prompt_can_be_ended_while_the_others_go_on():
    async def scenario(service):
        found = {0: 0, 1: 0}
        async with service.submit([([7], params(500)), ([8], params(30))]) as job:
            async for index, _ in job:
                found[index] += 1
                if index == 0:
                    job.abort(0)
        return found

    assert run(scenario, lambda: EchoEngine(step_seconds=0.001, max_length=1000)) == {0: 1, 1: 30}


def test_more_than_may_wait_are_refused_all_or_none():
    async def scenario(service):
        async with service.submit([([7], params(400))] * 5):  # 4 slots and 2 places to wait
            with pytest.raises(Full, match="5 prompts run or wait, and there is room for 1 more"):
                service.submit([([8], params(1))] * 2)
            assert service.open_prompts == 5
            assert await tokens(service.submit([([8], params(1))])) == {0: [8]}

    run(scenario, lambda: EchoEngine(slots=4, step_seconds=0.0005), max_waiting=2)


def test_a_prompt_that_the_engine_refuses_fails_alone():
    async def scenario(service):
        good = service.submit([([7], params(20))])
        with pytest.raises(ConfigError, match="too long"):
            await tokens(service.submit([([7] * 600, params(1))]))
        assert await tokens(good) == {0: [7] * 20}
        assert service.failure == ""

    run(scenario)


def test_a_failing_step_fails_what_runs_and_a_new_engine_takes_over(caplog):
    engines = []

    def fail(requests):
        if any(request.prompt == [13] for request in requests):
            raise FloatingPointError("thirteen\nand pages of program")

    def make():
        engines.append(EchoEngine(fail=fail, step_seconds=0.001))
        return engines[-1]

    async def scenario(service):
        other = service.submit([([7], params(400))])
        with pytest.raises(Failed, match="FloatingPointError: thirteen$"):
            await tokens(service.submit([([13], params(5))]))
        with pytest.raises(Failed, match="thirteen"):
            await tokens(other)
        assert service.failure == "FloatingPointError: thirteen"
        await until(lambda: service.engine is not None)
        assert await tokens(service.submit([([8], params(2))])) == {0: [8, 8]}
        assert service.failure == ""  # it works again

    run(scenario, make)
    assert len(engines) == 2
    assert "engine failed" in caplog.text


def test_an_engine_that_cannot_be_made_again_fails_requests_until_it_can(caplog):
    state = {"broken": False}

    def fail(requests):
        if state["broken"]:
            raise RuntimeError("out of memory")

    def make():
        if state["broken"]:
            raise RuntimeError("still out of memory")
        return EchoEngine(fail=fail)

    async def scenario(service):
        state["broken"] = True
        for _ in range(3):
            with pytest.raises(Failed, match="out of memory"):
                await tokens(service.submit([([7], params(2))]))
        state["broken"] = False
        assert await tokens(service.submit([([7], params(2))])) == {0: [7, 7]}

    run(scenario, make)


def test_an_engine_that_cannot_be_made_at_all_is_kept_as_the_reason():
    def make():
        raise ConfigError("cache_tokens: too few")

    async def scenario(service):
        assert not service.ready
        return service.refusal

    assert isinstance(run(scenario, make), ConfigError)


def test_nothing_is_taken_before_the_engine_is_made():
    made = threading.Event()

    def make():
        made.wait(10)
        return EchoEngine()

    async def scenario():
        service = EngineService(make)
        service.start()
        with pytest.raises(Unavailable, match="made ready"):
            service.submit([([7], params(1))])
        made.set()
        await service.wait_started()
        assert await tokens(service.submit([([7], params(1))])) == {0: [7]}
        await service.drain(0)

    asyncio.run(scenario())


def test_draining_finishes_what_runs_and_takes_nothing_new():
    async def scenario(service):
        running = asyncio.ensure_future(tokens(service.submit([([7], params(50))])))
        await asyncio.sleep(0)
        ending = asyncio.ensure_future(service.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down"):
            service.submit([([7], params(1))])
        begun = time.perf_counter()
        assert await running == {0: [7] * 50}
        await ending
        assert time.perf_counter() - begun < 10  # not the whole grace

    run(scenario, lambda: EchoEngine(step_seconds=0.001))


def test_draining_ends_what_does_not_finish_in_time():
    async def scenario(service):
        running = asyncio.ensure_future(tokens(service.submit([([7], params(10**6 - 1))])))
        await asyncio.sleep(0.02)
        await service.drain(0.05)
        with pytest.raises(Failed, match="shutting down"):
            await running

    run(scenario, lambda: EchoEngine(step_seconds=0.001, max_length=10**6))


def test_an_idle_service_uses_no_processor_time():
    async def scenario(service):
        await tokens(service.submit([([7], params(3))]))
        steps, used = service.engine.stats.steps, time.process_time()
        await asyncio.sleep(0.5)
        assert service.engine.stats.steps == steps
        assert time.process_time() - used < 0.1

    run(scenario)


def test_scores_come_from_the_engines_thread_between_steps():
    seen = []

    class Scoring(EchoEngine):
        def score(self, sequences, prefix_lengths, top):
            seen.append(threading.current_thread().name)
            if not sequences[0]:
                raise ConfigError("an empty sequence")
            return super().score(sequences, prefix_lengths, top)

    async def scenario(service):
        assert [one.logprobs for one in await service.score([[1, 2, 3]], [1])] == [[-1.0, -1.0]]
        with pytest.raises(ConfigError, match="empty"):
            await service.score([[]], [1])

    run(scenario, Scoring)
    assert seen == ["engine", "engine"]


def test_scores_count_as_work_that_waits():
    class Slow(EchoEngine):
        def score(self, sequences, prefix_lengths, top):
            time.sleep(0.1)
            return super().score(sequences, prefix_lengths, top)

    async def scenario(service):
        scoring = asyncio.ensure_future(service.score([[1, 2]] * 3, [1] * 3))
        await asyncio.sleep(0.02)
        with pytest.raises(Full):
            await service.score([[1, 2]] * 3, [1] * 3)
        assert await tokens(service.submit([([7], params(1))])) == {0: [7]}  # between two of the scores
        assert not scoring.done()
        assert [one.logprobs for one in await scoring] == [[-1.0]] * 3

    run(scenario, lambda: Slow(slots=1), max_waiting=3)


def test_an_engine_is_warmed_up_between_requests_which_go_first():
    submitted, steps = threading.Event(), []

    def warm_up(engine):
        yield "one of two"
        submitted.wait(5)  # a request comes while this one is at work
        yield "two of two"
        steps.append(engine.stats.steps)

    async def scenario(service):
        assert service.ready and service.preparing == "one of two"
        job = service.submit([([7], params(3))])
        submitted.set()
        found = await tokens(job)
        await until(lambda: not service.preparing)
        return found

    assert run(scenario, warm_up=warm_up) == {0: [7, 7, 7]}
    assert steps[0] >= 3


def test_an_engine_whose_warm_up_fails_is_made_again_without():
    tries = []

    def warm_up(engine):
        tries.append(engine)
        yield "one of one"
        raise RuntimeError("no memory")

    async def scenario(service):
        await until(lambda: service.ready and not service.preparing)
        return service.engine, await tokens(service.submit([([7], params(2))]))

    engine, found = run(scenario, warm_up=warm_up)
    assert found == {0: [7, 7]} and len(tries) == 1 and engine is not tries[0]
