;; The gateway's interface for its plugins (WIT package smg:gateway) around the module of
;; `requests.c`. What an exported function takes must have exported names.
(component
  ;; In its place `build.py` puts what was compiled.
  (core module $requests
    (memory (export "memory") 1)
    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) unreachable)
    (func (export "on-request")
      (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64) (result i32) unreachable)
    (func (export "on-response") (param i32 i32 i32 i32 i32) (result i32) unreachable))
  (core instance $core (instantiate $requests))
  (alias core export $core "memory" (core memory $memory))
  (alias core export $core "cabi_realloc" (core func $realloc))
  (alias core export $core "on-request" (core func $core-on-request))
  (alias core export $core "on-response" (core func $core-on-response))

  (type $unnamed-header (record (field "name" string) (field "value" string)))
  (export $header "header" (type $unnamed-header))
  (type $unnamed-request (record
    (field "method" string)
    (field "path" string)
    (field "query" string)
    (field "headers" (list $header))
    (field "body" (list u8))
    (field "request-id" string)
    (field "now-epoch-ms" u64)))
  (export $request "request" (type $unnamed-request))
  (type $unnamed-response (record
    (field "status" u16)
    (field "headers" (list $header))
    (field "body" (list u8))))
  (export $response "response" (type $unnamed-response))
  (type $unnamed-modify-action (record
    (field "status" (option u16))
    (field "headers-set" (list $header))
    (field "headers-add" (list $header))
    (field "headers-remove" (list string))
    (field "body-replace" (option (list u8)))))
  (export $modify-action "modify-action" (type $unnamed-modify-action))
  (type $unnamed-action (variant (case "continue") (case "reject" u16) (case "modify" $modify-action)))
  (export $action "action" (type $unnamed-action))

  (func $on-request (param "req" $request) (result $action)
    (canon lift (core func $core-on-request)
      (memory (core memory $memory)) (realloc (core func $realloc))))
  (func $on-response (param "resp" $response) (result $action)
    (canon lift (core func $core-on-response)
      (memory (core memory $memory)) (realloc (core func $realloc))))
  (instance $requests-plugin (export "on-request" (func $on-request)))
  (instance $responses-plugin (export "on-response" (func $on-response)))
  (export "smg:gateway/middleware-on-request" (instance $requests-plugin))
  (export "smg:gateway/middleware-on-response" (instance $responses-plugin)))
