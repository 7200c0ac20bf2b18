-- What Redis gives a script, and no more: os.time or math.random would make a replica differ from its master.
std = {
  read_globals = {
    "KEYS", "ARGV", "redis", "cjson", "cmsgpack", "struct", "bit",
    "assert", "error", "ipairs", "next", "pairs", "pcall", "select", "tonumber", "tostring", "type", "unpack",
    "string", "table",
    math = { fields = { "abs", "ceil", "floor", "fmod", "huge", "max", "min", "modf", "pow" } },
  },
}
max_line_length = 120
