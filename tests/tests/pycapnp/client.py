"""A client of Sepal in Python: the schema files and the manager's socket are all that it has.

usage: client.py SCHEMAS SOCKET SCENARIO

Prints a line for each thing that it saw, as "what: value"; the test that runs it reads them. See ../other_language.rs.
"""

import asyncio
import pathlib
import sys

import capnp

PROMPT = b"sepal> "

schemas = pathlib.Path(sys.argv[1])
manager_capnp = capnp.load(str(schemas / "manager.capnp"), imports=[str(schemas)])
guest_capnp = capnp.load(str(schemas / "guest.capnp"), imports=[str(schemas)])


def told(what, value):
    """Prints one thing that was seen, without line ends in it."""
    print(f"{what}: {str(value)!r}" if "\n" in str(value) else f"{what}: {value}", flush=True)


def expect_ok(what, completion):
    """Prints the outcome of an operation that returns nothing."""
    which = completion.which()
    told(what, "ok" if which == "ok" else f"{completion.error.kind} about {completion.error.about!r}: {completion.error.message}")


def worked(result):
    """Whether a result that brings a capability does; else it has an error."""
    return not result._has("error")


async def read_until(output, text, position):
    """Reads a console from a position until it shows a text. Returns what it read, and the position after it."""
    seen = b""
    while text not in seen:
        piece = await output.read(position=position)
        seen += bytes(piece.bytes)
        position = piece.position + len(piece.bytes)
        if piece.ended:
            break
    return seen, position


async def lifecycle(manager):
    """newGuest, create, bind, run, the console, stop."""
    version = await manager.version()
    told("version", version.version)
    told("protocol", version.protocol)
    told("protocol constant", manager_capnp.protocolVersion)

    taken = await manager.newGuest("snake")
    told("newGuest", "lifecycle" if worked(taken) else taken.error.kind)
    life = taken.lifecycle
    # In one round trip: nothing of this waits for the answer to what comes before it.
    created = life.create(config={"memoryMib": 32, "cmdline": "quiet hello=python"})
    guest = life.bind().guest
    run = life.run()
    expect_ok("create", await created)
    serial = (await guest.serial()).serial
    seen, position = await read_until(serial, PROMPT, 0)
    told("banner", seen.decode().splitlines()[0])
    await serial.write(bytes=b"info\r")
    seen, position = await read_until(serial, PROMPT, position)
    told("info", seen.decode())

    info = (await (await guest.observer()).observer.info()).info
    told("status", info.status)
    told("memory", info.descriptor.memoryMib)
    told("cmdline", info.descriptor.cmdline)
    told("layers", ",".join(f"{layer.name}={layer.state}" for layer in info.layers))

    expect_ok("stop", await life.stop())
    ended = await run
    told("run", f"{ended.which()} {ended.error.kind}")


async def errors(manager):
    """Expected failures are data: kind, sentence, field."""
    refused = await manager.newGuest("no such name!")
    told("bad name", f"{refused.error.kind} about {refused.error.about!r}")
    missing = await manager.lookup("nobody")
    told("lookup", missing.error.kind)

    life = (await manager.newGuest("eel")).lifecycle
    early = await life.run()
    told("run first", early.error.kind)
    for what, config in [
        ("unbuilt", {"sound": "on"}),
        ("instance id", {"instanceId": b"short"}),
        ("kernel", {"kernel": {"bytes": b"no kernel at all"}}),
        ("memory", {"memoryMib": 2**31 - 1}),
        ("disk", {"disks": [{"id": "d"}]}),
    ]:
        expect_ok(what, await life.create(config=config))
    try:
        await (await life.bind()).guest.serial()
        told("bind", "worked")
    except capnp.KjException as error:
        told("bind", error.description)
    again = await manager.newGuest("eel")
    told("taken", again.error.kind)
    expect_ok("remove", await manager.remove("nobody"))
    expect_ok("force", await manager.forceShutdown("nobody"))


class Sink(guest_capnp.EventSink.Server):
    """Collects events until the guest is gone."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def event(self, event, dropped, **kwargs):
        told("event", f"{event.guest} {event.which()} {dropped}")
        if event.which() == "removed":
            self.gone.set()


async def events(manager):
    """A capability of ours that the manager calls; and what dropping a lease does."""
    sink = Sink()
    subscription = (await manager.subscribe(sink=sink, replay=0)).subscription
    launched = await manager.launch(config={"name": "adder", "memoryMib": 16})
    told("launch", "launched" if worked(launched) else launched.error.kind)
    told("name", launched.name)
    guests = (await manager.list()).guests
    told("list", ",".join(f"{guest.name}={guest.status}" for guest in guests))
    observer = (await launched.guest.observer()).observer
    guest, lease = launched.guest, launched.lease
    del guest, lease, launched
    told("ended", (await observer.wait()).report.reason)
    expect_ok("remove", await manager.remove("adder"))
    await sink.gone.wait()
    del subscription


class Watcher(guest_capnp.EventSink.Server):
    """Remembers that a guest has started."""

    def __init__(self):
        self.started = asyncio.Event()

    async def event(self, event, dropped, **kwargs):
        if event.which() == "started":
            told("event", f"{event.guest} started")
            self.started.set()


async def capabilities(manager):
    """A console that is handed to another client, and taken back."""
    watcher = Watcher()
    subscription = (await manager.subscribe(sink=watcher, replay=0)).subscription
    launched = await manager.launch(config={"name": "boa", "memoryMib": 16, "cmdline": "quiet"})
    await watcher.started.wait()
    serial = (await launched.guest.serial()).serial

    # Handed on over this connection: reading only.
    narrowed = await serial.narrow(bounds={"only": ["output"]})
    reader = narrowed.facet.cast_as(guest_capnp.Serial)
    seen, position = await read_until(reader, PROMPT, 0)
    told("read", PROMPT.decode() in seen.decode())
    described = (await reader.describe()).description
    told("rights", ",".join(str(right) for right in described.rights))
    # A stream that has failed stays failed (a rule of Cap'n Proto), so this is tried on a capability of its own.
    typist = (await reader.narrow()).facet.cast_as(guest_capnp.Serial)
    try:
        await typist.write(bytes=b"info\r")
        await typist.end()
        told("write", "worked")
    except capnp.KjException as error:
        told("write", "PERMISSION_DENIED" if "PERMISSION_DENIED" in error.description else error.description)

    # Handed to somebody else, by a token.
    shared = await serial.share(bounds={"only": ["output", "input"]}, terms={"once": True, "label": "python"})
    told("token", shared.token.split(".")[0])
    other = await connect()
    redeemed = await other.redeem(shared.token)
    told("redeemed", f"{redeemed.kind} of {redeemed.guest}")
    theirs = redeemed.facet.cast_as(guest_capnp.Serial)
    await theirs.write(bytes=b"info\r")
    seen, position = await read_until(theirs, PROMPT, position)
    told("typed", "memory: " in seen.decode())
    told("again", (await other.redeem(shared.token)).error.kind)

    # A read that waits for output ends when its capability is taken back; so does everything after it.
    waiting = theirs.read(position=position)
    expect_ok("revoke", await shared.revoker.revoke())
    told("waiting", (await waiting).error.kind)
    told("read again", (await theirs.read(position=0)).error.kind)
    told("open", (await theirs.open()).error.kind)
    expect_ok("revoke the first", await narrowed.revoker.revoke())
    told("first", (await reader.read(position=0)).error.kind)
    # What it was derived from goes on.
    piece = await serial.read(position=0)
    told("own", "works" if len(piece.bytes) > 0 else "nothing")
    del subscription


async def connect():
    """The manager, over a connection of its own."""
    stream = await capnp.AsyncIoStream.create_unix_connection(sys.argv[2])
    client = capnp.TwoPartyClient(stream)
    connections.append(client)
    return client.bootstrap().cast_as(manager_capnp.GuestManager)


connections = []


async def main():
    scenarios = {"lifecycle": lifecycle, "errors": errors, "events": events, "capabilities": capabilities}
    await scenarios[sys.argv[3]](await connect())
    told("done", sys.argv[3])


asyncio.run(capnp.run(main()))
