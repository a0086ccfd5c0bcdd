/* exchange/wire.h: messages as bytes (protobuf, proto/kvloom.proto) and back, nothing believed.
 *
 * Decoding checks every field: lengths, ranges, counts against the frames beside it. What passes
 * is a message that the protocol can use without looking at sizes again. Memory for decoding is a
 * fixed arena inside the decoder: a control part that needs more is refused.
 * Threads  One decoder, one thread. Encoding needs no state. */
#ifndef KVL_EXCHANGE_WIRE_H
#define KVL_EXCHANGE_WIRE_H

#include "exchange/message.h"

#define KVL_WIRE_ARENA_BYTES (64u << 10)

/* The caller's storage; needs no ending. */
typedef struct kvl_wire_decoder {
    size_t n_used;
    _Alignas(16) uint8_t arena[KVL_WIRE_ARENA_BYTES];
} kvl_wire_decoder;

/* Writes the control part of a message. Cannot fail: a message is within its limits, or KVLoom
 * itself made a mistake. Returns the number of bytes, 1 .. KVL_CONTROL_BYTES_MAX. */
size_t kvl_wire_encode(const kvl_message *message, uint8_t bytes[KVL_CONTROL_BYTES_MAX]);

/* Reads a control part and checks it together with the sizes of its frames.
 * Errors   KVL_ERR_MALFORMED, KVL_ERR_TOO_LARGE: `error` names message, field and value.
 *          message->request is set where it could be read, so that the sender can be told. */
KVL_MUST_USE kvl_status kvl_wire_decode(kvl_wire_decoder *decoder, const void *bytes,
                                        size_t n_bytes, const kvl_frame *frames, size_t n_frames,
                                        kvl_message *message, kvl_error *error);

#endif /* KVL_EXCHANGE_WIRE_H */
