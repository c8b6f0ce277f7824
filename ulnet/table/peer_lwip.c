/* One end of a comparison with lwIP: its raw TCP interface over a packet socket, spinning. peers.py compiles and runs it.
 *
 * Usage: peer_lwip INTERFACE ADDRESS rtt|bulk AMOUNT LIMIT_S [PEER]. With a PEER it is the asking side and prints what it
 * measured: the median of AMOUNT one-byte round trips in us, or Gbit/s of AMOUNT bytes and an answer. Without, it prints
 * "ready" and answers one connection. Both end after the connection, or after LIMIT_S with status 3.
 *
 * Call order: main, open_device, tcpip_init, serve or ask, spin. All of lwIP runs under its core lock: in spin here, and in
 * its own thread, which keeps the timers.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "lwip/etharp.h"
#include "lwip/ip4_addr.h"
#include "lwip/pbuf.h"
#include "lwip/tcp.h"
#include "lwip/tcpip.h"
#include "netif/ethernet.h"

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif

enum { PORT = 7007, FRAME_BYTES = 2048, WARM = 100 };

static int device;
static int ended;
static unsigned char mac[6];
static struct netif interface;

static int bulk, asking;
static long amount, done_bytes, queued_bytes;
static double *times_us, start_us;
static long trips;
static char block[1 << 16];

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void fail(const char *what) {
    fprintf(stderr, "peer_lwip: %s\n", what);
    exit(1);
}

/* -- the packet socket ----------------------------------------------------------------------------- */

static void open_device(const char *name) {
    int on = 1, bytes = 4 << 20;
    struct ifreq request = {0};
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    device = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, 0);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (device < 0 || ioctl(device, SIOCGIFHWADDR, &request) < 0)
        fail(strerror(errno));
    memcpy(mac, request.ifr_hwaddr.sa_data, 6);
    setsockopt(device, SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof on);
    if (setsockopt(device, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(device, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    at.sll_ifindex = if_nametoindex(name);
    if (bind(device, (struct sockaddr *)&at, sizeof at) < 0)
        fail(strerror(errno));
}

static err_t put_frame(struct netif *netif, struct pbuf *p) {
    struct iovec parts[16];
    struct msghdr message = {.msg_iov = parts};
    (void)netif;
    for (; p != NULL && message.msg_iovlen < 16; p = p->next)
        parts[message.msg_iovlen++] = (struct iovec){p->payload, p->len};
    return sendmsg(device, &message, 0) < 0 ? ERR_IF : ERR_OK;
}

static err_t set_up(struct netif *netif) {
    netif->name[0] = 'p';
    netif->name[1] = 's';
    netif->output = etharp_output;
    netif->linkoutput = put_frame;
    netif->mtu = 1500;
    netif->hwaddr_len = 6;
    memcpy(netif->hwaddr, mac, 6);
    netif->flags = NETIF_FLAG_BROADCAST | NETIF_FLAG_ETHARP | NETIF_FLAG_ETHERNET | NETIF_FLAG_LINK_UP;
    return ERR_OK;
}

static void spin(double limit_us) {
    static char frame[FRAME_BYTES];
    double end = now_us() + limit_us;
    for (unsigned turn = 1; !ended; turn++) {
        ssize_t n = recv(device, frame, sizeof frame, 0);
        if (n <= 0) {
            if (turn % 1024 == 0 && now_us() > end)
                exit(3);
            continue;
        }
        LOCK_TCPIP_CORE();
        struct pbuf *p = pbuf_alloc(PBUF_RAW, (u16_t)n, PBUF_RAM);
        if (p != NULL) {
            pbuf_take(p, frame, (u16_t)n);
            if (interface.input(p, &interface) != ERR_OK)
                pbuf_free(p);
        }
        UNLOCK_TCPIP_CORE();
    }
}

/* -- what the ends do ------------------------------------------------------------------------------ */

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void push(struct tcp_pcb *pcb) {
    while (queued_bytes < amount) {
        long n = tcp_sndbuf(pcb);
        if (n > (long)sizeof block)
            n = sizeof block;
        if (n > amount - queued_bytes)
            n = amount - queued_bytes;
        if (n == 0 || tcp_write(pcb, block, (u16_t)n, 0) != ERR_OK)
            break;
        queued_bytes += n;
    }
    tcp_output(pcb);
}

static err_t on_sent(void *arg, struct tcp_pcb *pcb, u16_t n) {
    (void)arg, (void)n;
    push(pcb);
    return ERR_OK;
}

static void ask_trip(struct tcp_pcb *pcb) {
    start_us = now_us();
    tcp_write(pcb, block, 1, TCP_WRITE_FLAG_COPY);
    tcp_output(pcb);
}

static void got_answer(struct tcp_pcb *pcb) {
    double us = now_us() - start_us;
    if (bulk) {
        printf("%.6f\n", amount * 8 / us / 1e3);
        ended = 1;
        return;
    }
    if (trips >= WARM)
        times_us[trips - WARM] = us;
    if (++trips < amount + WARM) {
        ask_trip(pcb);
        return;
    }
    qsort(times_us, amount, sizeof *times_us, by_size);
    printf("%.3f\n", times_us[amount / 2]);
    ended = 1;
}

static err_t on_received(void *arg, struct tcp_pcb *pcb, struct pbuf *p, err_t error) {
    (void)arg;
    if (p == NULL || error != ERR_OK) {
        ended = 1;
        return ERR_OK;
    }
    u16_t n = p->tot_len;
    if (!asking && !bulk) { /* first the answer: the window can wait */
        tcp_write(pcb, p->payload, p->len, TCP_WRITE_FLAG_COPY);
        tcp_output(pcb);
    }
    tcp_recved(pcb, n);
    pbuf_free(p);
    if (asking) {
        got_answer(pcb);
    } else if (bulk && (done_bytes += n) == amount) {
        tcp_write(pcb, block, 1, TCP_WRITE_FLAG_COPY);
        tcp_output(pcb);
    }
    return ERR_OK;
}

static void on_error(void *arg, err_t error) {
    (void)arg, (void)error;
    ended = 1;
}

static void attend(struct tcp_pcb *pcb) {
    tcp_nagle_disable(pcb);
    tcp_recv(pcb, on_received);
    tcp_err(pcb, on_error);
}

static err_t on_accepted(void *arg, struct tcp_pcb *pcb, err_t error) {
    (void)arg;
    if (error == ERR_OK)
        attend(pcb);
    return error;
}

static err_t on_connected(void *arg, struct tcp_pcb *pcb, err_t error) {
    (void)arg, (void)error;
    if (!bulk) {
        ask_trip(pcb);
        return ERR_OK;
    }
    tcp_sent(pcb, on_sent);
    start_us = now_us();
    push(pcb);
    return ERR_OK;
}

static void on_started(void *arg) { *(volatile int *)arg = 1; }

int main(int argc, char **argv) {
    volatile int started = 0;
    ip4_addr_t address, mask, gateway;
    ip_addr_t peer;
    if (argc < 6)
        fail("usage: peer_lwip INTERFACE ADDRESS rtt|bulk AMOUNT LIMIT_S [PEER]");
    bulk = strcmp(argv[3], "bulk") == 0;
    amount = atol(argv[4]);
    asking = argc > 6;
    if (amount < 1 || !ip4addr_aton(argv[2], &address) || (asking && !ipaddr_aton(argv[6], &peer)))
        fail("an address or an amount is wrong");
    if (!bulk)
        times_us = calloc(amount, sizeof *times_us);
    open_device(argv[1]);
    ip4addr_aton("255.255.255.0", &mask);
    ip4addr_aton("0.0.0.0", &gateway);
    tcpip_init(on_started, (void *)&started);
    while (!started)
        usleep(1000);

    LOCK_TCPIP_CORE();
    netif_add(&interface, &address, &mask, &gateway, NULL, set_up, ethernet_input);
    netif_set_default(&interface);
    netif_set_up(&interface);
    struct tcp_pcb *pcb = tcp_new();
    if (asking) {
        attend(pcb);
        if (tcp_connect(pcb, &peer, PORT, on_connected) != ERR_OK)
            fail("no connection");
    } else {
        if (tcp_bind(pcb, IP_ADDR_ANY, PORT) != ERR_OK || (pcb = tcp_listen(pcb)) == NULL)
            fail("cannot listen");
        tcp_accept(pcb, on_accepted);
    }
    UNLOCK_TCPIP_CORE();
    if (!asking) {
        puts("ready");
        fflush(stdout);
    }
    spin(atof(argv[5]) * 1e6);
    fflush(stdout);
    _exit(asking && trips == 0 && !bulk);
}
