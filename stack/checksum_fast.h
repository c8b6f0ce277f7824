/* The fast path of the Internet checksum: AVX2 where the processor has it, 64-bit words elsewhere.
 *
 * Why C: per-function instruction sets and intrinsics have no spelling in Cython. Sums are 64-bit ones'-complement
 * accumulators over native-order words (RFC 1071 section 2: byte order and word size do not matter until the fold).
 * Vector trick: a lane's 64-bit words are added modulo 2^64 (a) and their upper halves apart (h). The sum of the lower
 * halves is then a - (h << 32), exactly, since neither half's sum overflows 64 bits: three operations for 32 bytes.
 */
#ifndef ULNET_CHECKSUM_FAST_H
#define ULNET_CHECKSUM_FAST_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t ulck_carry(uint64_t acc, uint64_t word)
{
    acc += word;
    return acc + (acc < word);
}

/* Short pieces, and everything on processors without AVX2: halves of 64-bit words into separate sums, which leaves no
 * chain of carries and no overflow below 32 GiB. dst NULL: no copy. */
static inline __attribute__((always_inline)) uint64_t ulck_words(uint8_t *dst, const uint8_t *p, size_t n, uint64_t acc)
{
    uint64_t w, v, s0 = 0, s1 = 0;
    uint32_t d;
    uint16_t h;
    while (n >= 16) {
        memcpy(&w, p, 8);
        memcpy(&v, p + 8, 8);
        if (dst) {
            memcpy(dst, &w, 8);
            memcpy(dst + 8, &v, 8);
            dst += 16;
        }
        s0 += (uint32_t)w;
        s1 += w >> 32;
        s0 += (uint32_t)v;
        s1 += v >> 32;
        p += 16;
        n -= 16;
    }
    if (n & 8) {
        memcpy(&w, p, 8);
        if (dst) {
            memcpy(dst, &w, 8);
            dst += 8;
        }
        s0 += (uint32_t)w;
        s1 += w >> 32;
        p += 8;
    }
    if (n & 4) {
        memcpy(&d, p, 4);
        if (dst) {
            memcpy(dst, &d, 4);
            dst += 4;
        }
        s0 += d;
        p += 4;
    }
    if (n & 2) {
        memcpy(&h, p, 2);
        if (dst) {
            memcpy(dst, &h, 2);
            dst += 2;
        }
        s1 += h;
        p += 2;
    }
    if (n & 1) { /* padded with a zero byte behind it */
        if (dst)
            *dst = *p;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        s0 += *p;
#else
        s0 += (uint32_t)*p << 8;
#endif
    }
    return ulck_carry(acc, s0 + s1);
}

static uint64_t ulck_add_words(const uint8_t *p, size_t n, uint64_t acc)
{
    return ulck_words(NULL, p, n, acc);
}

static uint64_t ulck_copy_words(uint8_t *dst, const uint8_t *p, size_t n, uint64_t acc)
{
    return ulck_words(dst, p, n, acc);
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* The lanes of a and h, as one 64-bit ones'-complement sum. */
static inline __attribute__((always_inline, target("avx2"))) uint64_t ulck_lanes(__m256i a, __m256i h, uint64_t acc)
{
    __m256i lo = _mm256_sub_epi64(a, _mm256_slli_epi64(h, 32)); /* < 2^32 for each word added: far from overflow */
    __m128i l = _mm_add_epi64(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
    __m128i u = _mm_add_epi64(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    uint64_t ls = (uint64_t)_mm_cvtsi128_si64(l) + (uint64_t)_mm_extract_epi64(l, 1);
    uint64_t us = (uint64_t)_mm_cvtsi128_si64(u) + (uint64_t)_mm_extract_epi64(u, 1);
    acc = ulck_carry(acc, ls);
    /* An upper half weighs 2^32, and 2^32 is 1 modulo 2^16 - 1: it may be added as it stands. */
    return ulck_carry(acc, us);
}

static inline __attribute__((always_inline, target("avx2")))
uint64_t ulck_vector(uint8_t *dst, const uint8_t *p, size_t n, uint64_t acc)
{
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, h0 = a0, h1 = a0;
    while (n >= 128) {
        __m256i x0 = _mm256_loadu_si256((const __m256i *)p);
        __m256i x1 = _mm256_loadu_si256((const __m256i *)(p + 32));
        __m256i x2 = _mm256_loadu_si256((const __m256i *)(p + 64));
        __m256i x3 = _mm256_loadu_si256((const __m256i *)(p + 96));
        if (dst) {
            _mm256_storeu_si256((__m256i *)dst, x0);
            _mm256_storeu_si256((__m256i *)(dst + 32), x1);
            _mm256_storeu_si256((__m256i *)(dst + 64), x2);
            _mm256_storeu_si256((__m256i *)(dst + 96), x3);
            dst += 128;
        }
        a0 = _mm256_add_epi64(a0, x0);
        a1 = _mm256_add_epi64(a1, x1);
        h0 = _mm256_add_epi64(h0, _mm256_srli_epi64(x0, 32));
        h1 = _mm256_add_epi64(h1, _mm256_srli_epi64(x1, 32));
        a0 = _mm256_add_epi64(a0, x2);
        a1 = _mm256_add_epi64(a1, x3);
        h0 = _mm256_add_epi64(h0, _mm256_srli_epi64(x2, 32));
        h1 = _mm256_add_epi64(h1, _mm256_srli_epi64(x3, 32));
        p += 128;
        n -= 128;
    }
    while (n >= 32) {
        __m256i x0 = _mm256_loadu_si256((const __m256i *)p);
        if (dst) {
            _mm256_storeu_si256((__m256i *)dst, x0);
            dst += 32;
        }
        a0 = _mm256_add_epi64(a0, x0);
        h0 = _mm256_add_epi64(h0, _mm256_srli_epi64(x0, 32));
        p += 32;
        n -= 32;
    }
    acc = ulck_lanes(_mm256_add_epi64(a0, a1), _mm256_add_epi64(h0, h1), acc);
    return n ? ulck_words(dst, p, n, acc) : acc;
}

static __attribute__((target("avx2"))) uint64_t ulck_add_avx2(const uint8_t *p, size_t n, uint64_t acc)
{
    return ulck_vector(NULL, p, n, acc);
}

static __attribute__((target("avx2"))) uint64_t ulck_copy_avx2(uint8_t *dst, const uint8_t *p, size_t n, uint64_t acc)
{
    return ulck_vector(dst, p, n, acc);
}

static int ulck_has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}
#else
#define ulck_add_avx2 ulck_add_words
#define ulck_copy_avx2 ulck_copy_words
static int ulck_has_avx2(void)
{
    return 0;
}
#endif

enum { ULCK_VECTOR_FROM = 96 }; /* below, the vector set-up costs more than it saves */
static int ulck_vector_on; /* set once, at import */

static inline uint64_t ulck_add(const uint8_t *p, size_t n, uint64_t acc)
{
    return n >= ULCK_VECTOR_FROM && ulck_vector_on ? ulck_add_avx2(p, n, acc) : ulck_words(NULL, p, n, acc);
}

static inline uint64_t ulck_copy(uint8_t *dst, const uint8_t *p, size_t n, uint64_t acc)
{
    return n >= ULCK_VECTOR_FROM && ulck_vector_on ? ulck_copy_avx2(dst, p, n, acc) : ulck_words(dst, p, n, acc);
}

/* The yardstick of the benchmark: the loop a straightforward C program has (RFC 1071 section 4.1). */
static __attribute__((noinline)) uint64_t ulck_naive(const uint8_t *p, size_t n, uint64_t acc)
{
    uint64_t sum = 0;
    uint16_t w;
    while (n > 1) {
        memcpy(&w, p, 2);
        sum += w;
        p += 2;
        n -= 2;
    }
    if (n) {
        w = 0;
        memcpy(&w, p, 1);
        sum += w;
    }
    return ulck_carry(acc, sum);
}

#endif
