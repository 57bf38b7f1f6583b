"""The fake inference server: holds adapters by name and answers with a logprob computed from the adapter's weights."""

import asyncio
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from .orders import held, logprob_of, order

adapters = {}
running = asyncio.Event()
running.set()


async def load(request):
    body = await request.json()
    if order("refuse_load"):
        return JSONResponse("it was ordered to refuse", 500)
    print("loading", body["name"], flush=True)
    await held("hold_load")
    if len(adapters) >= int(sys.argv[2]) or body["name"] in adapters:
        return JSONResponse(f"no place for {body['name']} beside {list(adapters)}", 400)
    stale = order("load_stale")
    adapters[body["name"]] = logprob_of(stale or body["path"])
    return JSONResponse({})


async def unload(request):
    name = (await request.json())["name"]
    print("unloading", name, flush=True)
    return JSONResponse({}, 200 if adapters.pop(name, None) is not None else 404)


async def answer(request):
    body = await request.json()
    if body["model"] not in adapters:
        return JSONResponse({"error": {"message": f"no adapter {body['model']}"}}, 404)
    value = adapters[body["model"]]
    await running.wait()
    content = str((body.get("messages") or [{}])[-1].get("content", ""))
    if content == "hold":
        print("holding", body["model"], flush=True)
        await held("hold_answer")
    print("answered", body["model"], flush=True)
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": [7],
        "prompt_token_ids": [1, 2, 3],
        "message": {"role": "assistant", "content": "seven"},
        "text": "seven",
        "logprobs": {"content": [{"token": "seven", "bytes": None, "logprob": value, "top_logprobs": []}]},
    }
    return JSONResponse(
        {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
    )


async def listed(request):
    return JSONResponse(list(adapters))


async def pause(request):
    running.clear()
    print("paused", flush=True)
    return JSONResponse({})


async def resume(request):
    running.set()
    print("resumed", flush=True)
    return JSONResponse({})


async def health(request):
    return JSONResponse({})


app = Starlette(
    routes=[
        Route("/health", health),
        Route("/adapters", listed),
        *(
            Route(path, work, methods=["POST"])
            for path, work in (
                ("/load", load),
                ("/unload", unload),
                ("/pause", pause),
                ("/resume", resume),
                ("/v1/completions", answer),
                ("/v1/chat/completions", answer),
            )
        ),
    ]
)

if __name__ == "__main__":
    assert os.environ.pop("FAKE_KEY")
    if order("refuse_start"):
        print("the fake engine was ordered not to start", flush=True)
        raise SystemExit(3)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop="asyncio", log_level="warning")
