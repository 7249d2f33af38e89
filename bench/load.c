/* Clients that each ask again as soon as they have their answer, over loopback.
 *
 *     load stay|churn|udp PORT CLIENTS SECONDS BYTES
 *
 * stay: a connection each, for as long as it runs. churn: a new connection for each request. udp: a socket each.
 * Ends when its standard input does. Prints one line of JSON: requests, seconds, failed, and how long the fastest 50, 99 and 99.9 percent waited (us). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 256
#define SLOTS 1000000 /* a microsecond each; the last one is for all that is longer */

struct client {
    int fd;
    size_t sent, received;
    double asked;
};

static struct sockaddr_in server;
static enum { STAY, CHURN, UDP } kind;
static int poll_fd;
static size_t size;
static char *message, scratch[1 << 18];
static unsigned waits[SLOTS];
static unsigned long answered, failed;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(struct client *client, int how, unsigned events)
{
    struct epoll_event event = {.events = events, .data.ptr = client};
    if (epoll_ctl(poll_fd, how, client->fd, &event) < 0)
        die("epoll_ctl");
}

static void join(struct client *client)
{
    int yes = 1;
    struct linger reset = {.l_onoff = 1}; /* so that no port stays taken for a minute */
    client->fd = socket(AF_INET, kind == UDP ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (client->fd < 0 || connect(client->fd, (struct sockaddr *)&server, sizeof server) < 0)
        die("connect");
    if (kind != UDP) {
        setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    }
    watch(client, EPOLL_CTL_ADD, EPOLLIN);
}

static void push(struct client *client)
{
    ssize_t done = send(client->fd, message + client->sent, size - client->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (done < 0 && errno != EAGAIN)
        failed++;
    client->sent += done > 0 ? done : 0;
    if (client->sent < size)
        watch(client, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

static void ask(struct client *client)
{
    client->asked = now();
    client->sent = client->received = 0;
    push(client);
}

static void rejoin(struct client *client)
{
    close(client->fd);
    join(client);
    ask(client);
}

static void take(struct client *client)
{
    ssize_t got = recv(client->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        failed++;
        rejoin(client);
        return;
    }
    client->received += got;
    if (client->received < size)
        return;
    double waited = (now() - client->asked) * 1e6;
    waits[waited < SLOTS - 1 ? (int)waited : SLOTS - 1]++;
    answered++;
    kind == CHURN ? rejoin(client) : ask(client);
}

static int fastest(double part)
{
    unsigned long seen = 0;
    for (int slot = 0; slot < SLOTS; slot++)
        if ((seen += waits[slot]) && seen >= answered * part)
            return slot;
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return fprintf(stderr, "usage: load stay|churn|udp PORT CLIENTS SECONDS BYTES\n"), 2;
    kind = !strcmp(argv[1], "udp") ? UDP : !strcmp(argv[1], "churn") ? CHURN : STAY;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int count = atoi(argv[3]);
    double seconds = atof(argv[4]);
    size = atol(argv[5]);
    message = malloc(size);
    struct client *clients = calloc(count, sizeof *clients);
    poll_fd = epoll_create1(0);
    if (!message || !clients || poll_fd < 0)
        die("load");
    memset(message, 'x', size);
    message[size - 1] = '\n';
    for (int i = 0; i < count; i++)
        join(&clients[i]);
    double begun = now(), until = begun + seconds;
    for (int i = 0; i < count; i++)
        ask(&clients[i]);
    while (now() < until) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poll_fd, events, EVENTS, 200);
        if (ready == 0 && kind == UDP) /* datagrams may be lost: all ask again */
            for (int i = 0; i < count; i++, failed++)
                ask(&clients[i]);
        for (int i = 0; i < ready; i++) {
            struct client *client = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) {
                watch(client, EPOLL_CTL_MOD, EPOLLIN);
                push(client);
            }
            if (events[i].events & ~EPOLLOUT)
                take(client);
        }
    }
    printf("{\"requests\": %lu, \"seconds\": %.4f, \"failed\": %lu, \"p50\": %d, \"p99\": %d, \"p999\": %d}\n", answered,
           now() - begun, failed, fastest(.5), fastest(.99), fastest(.999));
    fflush(stdout);
    getchar(); /* the connections stay until the server's CPU time was read, which the end of some would hide */
}
