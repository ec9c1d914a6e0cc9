"""The client against a fake server: a normal run, and one clear sentence for everything that goes wrong."""

import threading
import time

import pytest

from stretto.web.panel.measure import arms, errors
from stretto.web.panel.measure.client import ComfyClient


def test_a_run_returns_outputs_and_follows_steps(fake, workflow):
    _, url = fake()
    steps = []
    with ComfyClient(url) as client:
        result = client.run(arms.ensure_measure(workflow, 1), on_step=lambda step, total: steps.append((step, total)))
        assert result.seconds >= 0 and not result.cached
        picture = client.fetch_image(result.outputs["9"]["images"][0])
        assert picture.startswith(b"\x89PNG")
        (trace,) = client.traces(result.prompt_id)
        assert trace["totals"]["computed"] == 16
        assert client.health()["system"]["comfyui_version"] == "0.0-fake"
    assert steps == [(1, 28)]


def test_address_forms(fake):
    _, url = fake()
    with ComfyClient(url.removeprefix("http://") + "/") as client:
        assert client.base_url == url and client.loopback
    for wrong in ("ftp://x", "http://", "127.0.0.1:99999", "http://[::1", "http://a:b"):
        with pytest.raises(errors.ServerUnreachable, match="not a server address"):
            ComfyClient(wrong)


def test_server_not_reachable(workflow):
    with ComfyClient("http://127.0.0.1:9") as client:
        with pytest.raises(errors.ServerUnreachable, match=r"No ComfyUI server answers at http://127.0.0.1:9"):
            client.health()
        with pytest.raises(errors.ServerUnreachable):
            client.run(workflow)


def test_validation_error_names_node_and_input(fake, workflow):
    _, url = fake()
    with ComfyClient(url) as client, pytest.raises(errors.InvalidWorkflow) as caught:
        client.run(arms.set_steps(workflow, 20000))
    assert (caught.value.node_id, caught.value.class_type, caught.value.field) == ("5", "KSampler", "steps")
    assert "KSampler (node 5), input 'steps': Value 20000 bigger than max of 10000" in str(caught.value)


def test_unknown_node_is_named(fake, workflow):
    _, url = fake(with_pack=False)
    with ComfyClient(url) as client, pytest.raises(errors.InvalidWorkflow, match="StrettoCache does not exist"):
        client.run(workflow)


def test_execution_error_names_the_node_and_hides_the_traceback(fake, workflow):
    server, url = fake()
    server.fail = "execution"
    with ComfyClient(url) as client, pytest.raises(errors.ExecutionFailed) as caught:
        client.run(workflow)
    assert str(caught.value) == "KSampler (node 5) failed: mat1 and mat2 shapes cannot be multiplied"


def test_cancelled_in_comfyui(fake, workflow):
    server, url = fake()
    server.fail = "interrupt"
    with ComfyClient(url) as client, pytest.raises(errors.Interrupted):
        client.run(workflow)


def test_server_dies_in_the_middle(fake, workflow):
    server, url = fake()
    server.fail = "die"
    with ComfyClient(url) as client, pytest.raises(errors.ServerDied, match="went away in the middle of a run"):
        client.run(workflow)


def test_stop_cancels_the_run_on_the_server(fake, workflow):
    server, url = fake()
    server.fail = "hang"
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with ComfyClient(url) as client, pytest.raises(errors.Stopped):
        client.run(workflow, stop=stop)
    assert server.interrupted == {"run-0"}


def test_timeout_cancels_the_run_on_the_server(fake, workflow):
    server, url = fake()
    server.fail = "hang"
    began = time.monotonic()
    with ComfyClient(url) as client, pytest.raises(errors.RunTimeout, match="took longer than allowed"):
        client.run(workflow, timeout=0.2)
    assert time.monotonic() - began < 3 and server.interrupted == {"run-0"}


def test_a_server_without_the_pack_has_no_traces(fake, workflow):
    _, url = fake(with_pack=False)
    with ComfyClient(url) as client:
        result = client.run(arms.plain(arms.remove(workflow, ["StrettoReport"])))
        assert client.traces(result.prompt_id) is None
        assert not client.has_node("StrettoMeasure")


def test_something_else_at_the_address(fake):
    server, url = fake()
    server.history = {}
    with ComfyClient(url) as client, pytest.raises(errors.ServerRefused, match="HTTP 404"):
        client._json("/nothing")
