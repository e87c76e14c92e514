"""What the shipped HAProxy does with requests and answers, before stand-ins for servers that do as they are told."""

import contextlib
import http.client
import json
import re
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from ports import free_port
from system.balancer import (
    BODY_BYTES,
    CHAT,
    NAMES,
    HaProxy,
    StandIn,
    asking,
    balancer,
    configuration,
    picture,
    post,
    reply,
    shipped,
    until,
)
from waiting import HANG

pytestmark = pytest.mark.system

MEDIA = [asking(picture(f'https://example.com/{number}')) for number in range(150)]
LARGE = asking(picture('data:image/png;base64,' + 'A' * 7_000_000))  # a picture of 5 MB
TOO_LARGE = asking(picture('data:image/png;base64,' + 'A' * BODY_BYTES))
EVENTS = 20


def ok(handler):
    reply(handler, 200, b'answered')


def busy(handler):
    reply(handler, 503, b'busy', Retry_After='7')


def ends(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed


@pytest.fixture
def serve(tmp_path):
    """``serve(answer, ...)``: HAProxy before stand-ins that answer so."""
    with ExitStack() as stack:

        def start(*answers):
            stand_ins = [stack.enter_context(StandIn(answer)) for answer in answers]
            return stack.enter_context(balancer(tmp_path, *(one.port for one in stand_ins))), stand_ins

        yield start


def served_by(running, body):
    """The name of the server that answers."""
    status, headers, _ = post(running.url + CHAT, body)
    assert status == 200
    return headers['X-Served-By']


def placed(running, bodies=MEDIA):
    """The names of the servers that answer, all asked side by side."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda body: served_by(running, body), bodies))


def test_the_buffer_is_what_the_tests_take_it_for():
    assert f'tune.bufsize {BODY_BYTES}\n' in shipped({})


def test_headers_pass(serve):
    running, stand_ins = serve(ok, ok)
    headers = {'Authorization': 'Bearer secret', 'X-Api-Key': 'secret too', 'X-Forwarded-For': '10.9.8.7'}
    name = post(running.url + CHAT, MEDIA[0], **headers)[1]['X-Served-By']
    [seen] = stand_ins[NAMES.index(name)].seen
    assert (seen['Authorization'], seen['X-Api-Key']) == ('Bearer secret', 'secret too')
    assert seen.get_all('X-Forwarded-For') == ['127.0.0.1']  # whatever the client says


@pytest.mark.parametrize(
    'path', ['/metrics', '/metrics/', '/metricsx', '/metrics?a=b', '/metrics/a', '/%6detrics', '/%6Detric%73/']
)
def test_metrics_are_of_one_server(serve, path):
    running, _ = serve(ok, ok)
    assert status_of(running, path) == 404


def test_other_paths_are_passed_on(serve):
    running, _ = serve(ok, ok)
    assert [status_of(running, path) for path in ('/health', '/v1/metrics', '/?/metrics')] == [200] * 3


def status_of(running, path):
    with closing(http.client.HTTPConnection('127.0.0.1', running.port, timeout=HANG)) as connection:
        connection.request('GET', path)
        return connection.getresponse().status


def test_one_address_can_be_bounded(tmp_path):
    """With the lines that are commented out."""
    port = free_port()
    with StandIn(ok) as one, ExitStack() as stack:
        text = configuration(port, [one.port])
        bounded = re.sub(r'# (tcp-request|backend clients|    stick-table)', r'\1', text)
        assert len(text) - len(bounded) == 2 * 4  # two lines in the frontend, two of the table
        limit = int(re.search(r'table_conn_cur\(clients\) ge (\d+)', bounded)[1])
        stack.enter_context(HaProxy(bounded, port, tmp_path))
        until(lambda: answers(port))  # the connection that saw HAProxy start is gone
        kept = [stack.enter_context(closing(connected(port))) for _ in range(limit)]
        assert all(health(one) == 200 for one in kept)
        assert not answers(port)
        kept[0].close()
        until(lambda: answers(port))


def connected(port):
    return http.client.HTTPConnection('127.0.0.1', port, timeout=HANG)


def health(connection):
    connection.request('GET', '/health')
    response = connection.getresponse()
    response.read()
    return response.status


def answers(port):
    """Whether a new connection is taken."""
    with closing(connected(port)) as connection:
        try:
            return health(connection) == 200
        except (ConnectionError, http.client.RemoteDisconnected):
            return False


@pytest.mark.parametrize('fault', ['busy', 'closed'])
def test_another_server_answers(serve, fault):
    running, [one, two] = serve(busy, ok)
    if fault == 'closed':
        one.stop()
    bodies = [*[asking()] * 4, LARGE, *MEDIA[:20]]
    assert set(placed(running, bodies)) == {'two'} and len(two.seen) == len(bodies)
    assert fault == 'closed' or len(one.seen) > 3  # it was asked first by some


def test_all_are_busy(serve):
    running, stand_ins = serve(busy, busy, busy)
    for number, body in enumerate((asking(), MEDIA[0], LARGE), 1):
        status, headers, told = post(running.url + CHAT, body)
        assert (status, headers['Retry-After'], told) == (503, '7', b'busy')
        assert sum(len(one.seen) for one in stand_ins) == 2 * number


def test_what_a_server_ends_over_is_not_sent_to_another(serve):
    running, stand_ins = serve(ends, ends, ends)
    for number, body in enumerate((asking(), MEDIA[0], LARGE), 1):
        assert_refused(running, body)
        assert sum(len(one.seen) for one in stand_ins) == number


def test_no_server_is_left(serve):
    running, stand_ins = serve(ok, ok)
    for one in stand_ins:
        one.stop()
    for body in (asking(), MEDIA[0], LARGE):
        assert_refused(running, body)


def assert_refused(running, body):
    """By HAProxy itself."""
    status, headers, told = post(running.url + CHAT, body)
    assert (status, headers['Retry-After'], json.loads(told)['code']) == (503, '5', 503)
    assert json.loads(told)['message'].endswith('Try again later.')


def test_what_exceeds_the_buffer_is_sent_once(serve):
    running, stand_ins = serve(busy, busy)
    status, headers, told = post(running.url + CHAT, TOO_LARGE)
    assert (status, headers['Retry-After'], told) == (503, '7', b'busy')
    assert sum(len(one.seen) for one in stand_ins) == 1


def test_a_server_that_is_gone_moves_its_share_only(serve):
    running, stand_ins = serve(ok, ok, ok)
    before = placed(running)
    shares = Counter(before)
    assert placed(running) == before and all(shares[name] > len(MEDIA) / 6 for name in NAMES), shares
    stand_ins[1].stop()
    without = placed(running)
    assert [name for name, old in zip(without, before, strict=True) if old != 'two'] == [
        name for name in before if name != 'two'
    ]
    assert {name for name, old in zip(without, before, strict=True) if old == 'two'} == {'one', 'three'}
    with StandIn(ok, stand_ins[1].port):
        until(lambda: placed(running) == before)


def test_a_server_that_is_not_well_gets_nothing(serve):
    running, [one, _] = serve(ok, ok)
    own = [body for body, name in zip(MEDIA, placed(running), strict=True) if name == 'one']
    one.well = False
    until(lambda: set(placed(running, own[:1])) == {'two'})
    seen = len(one.seen)
    assert set(placed(running, own + [asking()] * 20)) == {'two'} and len(one.seen) == seen
    one.well = True
    until(lambda: set(placed(running, own[:1])) == {'one'})


def test_texts_go_where_fewest_run(serve):
    """All wait until all have arrived: so many run at a time."""
    together = threading.Barrier(20, timeout=HANG)

    def wait(handler):
        together.wait()
        ok(handler)

    running, stand_ins = serve(wait, wait)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: served_by(running, asking()), range(20)))
    assert [len(one.seen) for one in stand_ins] == [10, 10]


def test_tokens_arrive_one_by_one(serve):
    """The server sends an event when the client has the one before."""
    arrived = threading.Semaphore(1)

    def stream(handler):
        handler.send_response(200)
        handler.send_header('Content-Type', 'text/event-stream')
        handler.send_header('Transfer-Encoding', 'chunked')
        handler.end_headers()
        for number in range(EVENTS):
            assert arrived.acquire(timeout=HANG)
            event = b'data: %d\n\n' % number
            handler.wfile.write(b'%x\r\n%s\r\n' % (len(event), event))
        handler.wfile.write(b'0\r\n\r\n')

    running, _ = serve(stream, stream)
    with closing(http.client.HTTPConnection('127.0.0.1', running.port, timeout=HANG)) as connection:
        connection.request('POST', CHAT, json.dumps(MEDIA[0] | {'stream': True}))
        response = connection.getresponse()
        for number in range(EVENTS):
            assert response.readline() == b'data: %d\n' % number and response.readline() == b'\n'
            arrived.release()
        assert response.read() == b''


def test_a_stream_that_is_cut_is_seen_to_be(serve):
    def cut(handler):
        handler.send_response(200)
        handler.send_header('Transfer-Encoding', 'chunked')
        handler.end_headers()
        handler.wfile.write(b'9\r\ndata: 0\n\n\r\n')
        ends(handler)

    running, stand_ins = serve(cut, cut)
    with closing(http.client.HTTPConnection('127.0.0.1', running.port, timeout=HANG)) as connection:
        connection.request('POST', CHAT, json.dumps(MEDIA[0]))
        response = connection.getresponse()
        with pytest.raises(http.client.IncompleteRead) as error:
            response.read()
    assert (response.status, error.value.partial) == (200, b'data: 0\n\n')
    assert sum(len(one.seen) for one in stand_ins) == 1  # what has begun is not begun again


def test_a_silent_server_is_asked_whether_it_is_there(serve):
    """The kernel's timer of the connection, which is two hours where nobody sets it."""
    waiting, go_on = threading.Event(), threading.Event()

    def wait(handler):
        waiting.set()
        assert go_on.wait(HANG)
        ok(handler)

    running, [one] = serve(wait)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running.url + CHAT, MEDIA[0])
        assert waiting.wait(HANG)
        # local address, remote address, state, queues, timer:hundredths of a second
        rows = [line.split() for line in Path('/proc/net/tcp').read_text().splitlines()[1:]]
        [timer] = [row[5] for row in rows if row[2].endswith(f':{one.port:04X}') and row[3] == '01']
        go_on.set()
        assert answer.result()[0] == 200
    kind, left = timer.split(':')
    assert kind == '02' and int(left, 16) <= 30 * 100


@pytest.mark.parametrize('begun', [False, True], ids=['before headers', 'in a stream'])
def test_a_client_that_leaves(serve, begun):
    waiting, left = threading.Event(), threading.Event()

    def watch(handler):
        if begun:
            handler.send_response(200)
            handler.send_header('Transfer-Encoding', 'chunked')
            handler.end_headers()
        waiting.set()
        with contextlib.suppress(ConnectionResetError):
            assert handler.connection.recv(1) == b''
        left.set()

    running, _ = serve(watch, watch)
    with closing(http.client.HTTPConnection('127.0.0.1', running.port, timeout=HANG)) as connection:
        connection.request('POST', CHAT, json.dumps(MEDIA[0]))
        assert waiting.wait(HANG)
        if begun:
            assert connection.getresponse().status == 200
        assert not left.is_set()
    assert left.wait(HANG)
