/* The least that a pre-forked echo can cost: what all others are compared with.
 *
 *     floor tcp|udp PORT WORKERS
 *
 * TCP: all workers wait on one listener, each woken alone (EPOLLEXCLUSIVE). UDP: a socket for each worker
 * (SO_REUSEPORT). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS 256

static char buffer[1 << 18];
static struct sockaddr_in address;

static int bound(int type, int option)
{
    int yes = 1, fd = socket(AF_INET, type | SOCK_NONBLOCK, 0);
    setsockopt(fd, SOL_SOCKET, option, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        perror("bind");
        exit(1);
    }
    return fd;
}

static void send_all(int fd, const char *data, ssize_t left)
{
    while (left > 0) {
        ssize_t done = send(fd, data, left, MSG_NOSIGNAL);
        if (done < 0 && errno != EAGAIN)
            return;
        if (done < 0) { /* full: waits for this client alone, which an echo to these clients may */
            struct pollfd one = {.fd = fd, .events = POLLOUT};
            poll(&one, 1, -1);
            continue;
        }
        data += done;
        left -= done;
    }
}

static void serve_streams(int listener)
{
    int poll_fd = epoll_create1(0), yes = 1;
    struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = listener}, events[EVENTS];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poll_fd, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0)
                    continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                event = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
                continue;
            }
            ssize_t got = recv(fd, buffer, sizeof buffer, 0);
            if (got > 0)
                send_all(fd, buffer, got);
            else
                close(fd);
        }
    }
}

static void serve_datagrams(int fd)
{
    int poll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        epoll_wait(poll_fd, &event, 1, -1);
        for (ssize_t got; (got = recvfrom(fd, buffer, sizeof buffer, 0, (void *)&from, &length)) >= 0;)
            sendto(fd, buffer, got, 0, (void *)&from, length);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return fprintf(stderr, "usage: floor tcp|udp PORT WORKERS\n"), 2;
    int udp = !strcmp(argv[1], "udp"), listener = -1;
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (!udp) {
        listener = bound(SOCK_STREAM, SO_REUSEADDR);
        listen(listener, 4096);
    }
    for (int i = atoi(argv[3]); i > 0; i--)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            udp ? serve_datagrams(bound(SOCK_DGRAM, SO_REUSEPORT)) : serve_streams(listener);
        }
    pause();
}
