"""redis-py against a stock redis-server: ``redis_client HOST PORT``."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.programs.apps.clients import error_of, say
from tests.programs.apps.site import pattern

host, port = sys.argv[1], int(sys.argv[2])
once = Retry(NoBackoff(), 0)
with redis.Redis(host, port, socket_timeout=20) as client:
    say("ping", answer=client.ping())
    for size in (0, 1, 1448, 100_000, 3_000_000):
        say("set", size=size, answer=client.set(f"k{size}", pattern(size)), back=client.get(f"k{size}"))
    with client.pipeline(transaction=False) as pipe:
        for number in range(5000):
            pipe.incrby("sum", number)
        say("pipeline", last=pipe.execute()[-1])
    client.rpush("list", *range(100))
    say("list", all=[int(x) for x in client.lrange("list", 0, -1)])
    with ThreadPoolExecutor(8) as pool:
        say("threads", sum=sum(pool.map(lambda n: client.incr("together"), range(200))))
    with client.pubsub() as heard:
        heard.subscribe("news")
        heard.get_message(timeout=5)
        for number in range(20):
            client.publish("news", f"item {number}")
        got = [heard.get_message(timeout=5) for _ in range(20)]
        say("subscribed", got=[m["data"].decode() for m in got if m])
        say("silence", got=heard.get_message(timeout=0.1))
    say("wrong type", error=error_of(client.incr, "list"))
say("blocked", error=error_of(redis.Redis(host, port, socket_timeout=0.2, retry=once).blpop, ["empty"], 5))
say("refused", error=error_of(redis.Redis(host, 1, retry=once).ping)[0])


async def main() -> None:
    async with redis.asyncio.Redis(host=host, port=port) as client:
        answers = await asyncio.gather(*(client.incr("async") for _ in range(100)))
        say("asyncio", sum=sum(answers))


asyncio.run(main())
