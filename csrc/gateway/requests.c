// Requests that coding agents send and the gateway would refuse: a plugin of the gateway rewrites
// them. Compiled to WebAssembly without a library; `component.wat` gives it the gateway's
// interface.
//
// Of a POST to /v1/responses
//   - the field `client_metadata` is left out, which says who asks and nothing of the answer;
//   - reasoning that comes back gets an `id` where it has none, and loses `content` that is null;
//   - `web_search_call` items are left out, which tell of a search but not what it found.
// Whatever else is there stays as it came, byte for byte, for the gateway to judge.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(name)))

// --- memory: an instance serves one call, so nothing is freed
// -------------------------------------

extern uint8_t __heap_base;
static uintptr_t heap_end;

static void* allocate(size_t size, size_t alignment) {
    if (heap_end == 0) heap_end = (uintptr_t)&__heap_base;
    const uintptr_t begin = (heap_end + alignment - 1) & ~(uintptr_t)(alignment - 1);
    heap_end = begin + size;
    const size_t pages = (heap_end + 65535) / 65536;
    if (pages > __builtin_wasm_memory_size(0) &&
        __builtin_wasm_memory_grow(0, pages - __builtin_wasm_memory_size(0)) == (size_t)-1) {
        __builtin_trap();
    }
    return (void*)begin;
}

// The canonical ABI's way to put arguments here.
EXPORT("cabi_realloc")
void* cabi_realloc(void* old, size_t old_size, size_t alignment, size_t size) {
    uint8_t* moved = allocate(size, alignment);
    for (size_t i = 0; i < old_size; ++i) moved[i] = ((uint8_t*)old)[i];
    return moved;
}

// --- JSON: pieces of text, read no deeper than needed
// ---------------------------------------------

typedef struct {
    const uint8_t* begin;
    const uint8_t* end;
} Text;

static bool same(Text text, const char* word) {
    for (; text.begin < text.end && *word; ++text.begin, ++word) {
        if (*text.begin != (uint8_t)*word) return false;
    }
    return text.begin == text.end && !*word;
}

static const uint8_t* skip_space(const uint8_t* at, const uint8_t* end) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) ++at;
    return at;
}

// Behind the string that begins at `at`; null if it does not end.
static const uint8_t* skip_string(const uint8_t* at, const uint8_t* end) {
    for (++at; at < end; ++at) {
        if (*at == '"') return at + 1;
        if (*at == '\\') ++at;
    }
    return NULL;
}

static bool delimits(uint8_t byte) {
    return byte == ',' || byte == ':' || byte == '}' || byte == ']' || byte == ' ' ||
           byte == '\t' || byte == '\n' || byte == '\r';
}

// Behind the value that begins at `at`, whatever is in it; null if it does not end.
static const uint8_t* skip_value(const uint8_t* at, const uint8_t* end) {
    if (at >= end) return NULL;
    if (*at == '"') return skip_string(at, end);
    if (*at != '{' && *at != '[') {
        const uint8_t* begin = at;
        while (at < end && !delimits(*at)) ++at;
        return at == begin ? NULL : at;
    }
    for (size_t depth = 0; at < end;) {
        if (*at == '"') {
            at = skip_string(at, end);
            if (at == NULL) return NULL;
            continue;
        }
        if (*at == '{' || *at == '[') ++depth;
        if ((*at == '}' || *at == ']') && --depth == 0) return at + 1;
        ++at;
    }
    return NULL;
}

// One after the other the members of an object or the elements of an array.
typedef struct {
    const uint8_t* at;
    const uint8_t* end;
    bool begun;
    bool broken;
} Walk;

typedef struct {
    Text whole;  // key and value
    Text key;    // without quotes; empty in an array
    Text value;
} Entry;

static Walk walk(Text of) {
    return (Walk){of.begin + 1, of.end, false, false};
}

static bool next(Walk* walk, bool keyed, Entry* entry) {
    const uint8_t* const end = walk->end;
    const uint8_t* at = skip_space(walk->at, end);
    if (at < end && (*at == '}' || *at == ']')) {
        walk->at = at + 1;
        return false;
    }
    walk->broken = true;
    if (walk->begun) {
        if (at >= end || *at != ',') return false;
        at = skip_space(at + 1, end);
    }
    entry->whole.begin = at;
    entry->key = (Text){at, at};
    if (keyed) {
        const uint8_t* behind = at < end && *at == '"' ? skip_string(at, end) : NULL;
        if (behind == NULL) return false;
        entry->key = (Text){at + 1, behind - 1};
        at = skip_space(behind, end);
        if (at >= end || *at != ':') return false;
        at = skip_space(at + 1, end);
    }
    const uint8_t* behind = skip_value(at, end);
    if (behind == NULL) return false;
    entry->value = (Text){at, behind};
    entry->whole.end = walk->at = behind;
    walk->begun = true;
    walk->broken = false;
    return true;
}

// --- rewriting
// ------------------------------------------------------------------------------------

typedef struct {
    uint8_t* begin;
    uint8_t* end;
    bool changed;
    bool broken;
} Rewritten;

static void put(Rewritten* out, Text text) {
    __builtin_memcpy(out->end, text.begin, (size_t)(text.end - text.begin));
    out->end += text.end - text.begin;
}

static void put_word(Rewritten* out, const char* word) {
    for (; *word; ++word) *out->end++ = (uint8_t)*word;
}

// A comma before every entry but the first.
static void separate(Rewritten* out) {
    if (out->end[-1] != '{' && out->end[-1] != '[') *out->end++ = ',';
}

static bool member(Text object, const char* name, Text* value) {
    Walk members = walk(object);
    for (Entry entry; next(&members, true, &entry);) {
        if (!same(entry.key, name)) continue;
        *value = entry.value;
        return true;
    }
    return false;
}

static void put_reasoning(Rewritten* out, Text item) {
    put_word(out, "{");
    Text id;
    if (!member(item, "id", &id) || same(id, "null")) {
        put_word(out, "\"id\":\"rs_0\"");
        out->changed = true;
    }
    Walk members = walk(item);
    for (Entry entry; next(&members, true, &entry);) {
        const bool null = same(entry.value, "null");
        if (null && (same(entry.key, "id") || same(entry.key, "content"))) {
            out->changed = true;
            continue;
        }
        separate(out);
        put(out, entry.whole);
    }
    put_word(out, "}");
}

static void put_items(Rewritten* out, Text items) {
    put_word(out, "[");
    Walk elements = walk(items);
    for (Entry item; next(&elements, false, &item);) {
        Text type = {NULL, NULL};
        if (*item.value.begin == '{') member(item.value, "type", &type);
        if (same(type, "\"web_search_call\"")) {
            out->changed = true;
            continue;
        }
        separate(out);
        if (same(type, "\"reasoning\"")) {
            put_reasoning(out, item.value);
        } else {
            put(out, item.whole);
        }
    }
    out->broken |= elements.broken;
    put_word(out, "]");
}

static Rewritten rewrite(Text body) {
    Rewritten out = {NULL, NULL, false, true};
    body.begin = skip_space(body.begin, body.end);
    if (body.begin >= body.end || *body.begin != '{') return out;
    // An item of reasoning is longer than the id that it may get.
    out.begin = out.end = allocate(2 * (size_t)(body.end - body.begin) + 16, 1);
    out.broken = false;
    put_word(&out, "{");
    Walk members = walk(body);
    for (Entry entry; next(&members, true, &entry);) {
        if (same(entry.key, "client_metadata")) {
            out.changed = true;
            continue;
        }
        separate(&out);
        if (same(entry.key, "input") && *entry.value.begin == '[') {
            put_word(&out, "\"input\":");
            put_items(&out, entry.value);
        } else {
            put(&out, entry.whole);
        }
    }
    put_word(&out, "}");
    out.broken |= members.broken || skip_space(members.at, members.end) != members.end;
    return out;
}

// --- the gateway's interface
// ----------------------------------------------------------------------

enum { kContinue, kReject, kModify };

typedef struct {
    const void* begin;
    size_t size;
} List;

typedef struct {
    uint8_t kind;  // of an action: continue, reject, modify
    struct {
        struct {
            bool some;
            uint16_t value;
        } status;
        List headers_set, headers_add, headers_remove;
        struct {
            bool some;
            List value;
        } body;
    } modify;
} Action;

EXPORT("on-request")
const Action* on_request(const uint8_t* method, size_t method_size, const uint8_t* path,
                         size_t path_size, const uint8_t* query, size_t query_size,
                         const void* headers, size_t header_count, const uint8_t* body,
                         size_t body_size, const uint8_t* request_id, size_t request_id_size,
                         uint64_t now_epoch_ms) {
    (void)query, (void)query_size, (void)headers, (void)header_count;
    (void)request_id, (void)request_id_size, (void)now_epoch_ms;
    static Action action;
    const bool responses = same((Text){method, method + method_size}, "POST") &&
                           same((Text){path, path + path_size}, "/v1/responses");
    if (!responses) return &action;
    const Rewritten found = rewrite((Text){body, body + body_size});
    if (found.broken || !found.changed) return &action;
    action.kind = kModify;
    action.modify.body.some = true;
    action.modify.body.value = (List){found.begin, (size_t)(found.end - found.begin)};
    return &action;
}

EXPORT("on-response")
const Action* on_response(uint32_t status, const void* headers, size_t header_count,
                          const uint8_t* body, size_t body_size) {
    (void)status, (void)headers, (void)header_count, (void)body, (void)body_size;
    static Action action;
    return &action;
}
