// A client of millstream in plain Node, written from docs/protocol.md: submits texts as one job and prints their results.
//   node client.mjs redis://127.0.0.1:6379/0 SERVICE OPERATION broker/queue/lua/enqueue.lua TEXT...
import { createHash, randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { connect } from 'node:net'

const ACCEPTED = 1, ACCEPTED_BEFORE = 2, NORMAL = 2, DEADLINE_MS = 60_000
const key = (service, ...rest) => ['ms', `{${service}}`, ...rest].join(':')
const hex = () => randomBytes(16).toString('hex')

// One connection that speaks RESP2. Its replies are Buffers, numbers, null and arrays of these.
class Redis {
  bytes = Buffer.alloc(0)
  waiting = []

  constructor(url) {
    const { protocol, hostname, port, pathname, username, password } = new URL(url)
    this.socket = protocol === 'unix:' ? connect(pathname) : connect(Number(port || 6379), hostname)
    this.socket.on('data', (data) => this.take(data))
    this.socket.on('error', (error) => this.fail(error))
    this.socket.on('close', () => this.fail(new Error('the server closed the connection')))
    if (password) this.send('AUTH', ...(username ? [username] : []), decodeURIComponent(password))
    if (protocol !== 'unix:' && pathname.length > 1) this.send('SELECT', pathname.slice(1))
  }

  send(...words) {
    this.socket.write(`*${words.length}\r\n`)
    for (const bytes of words.map((word) => Buffer.from(Buffer.isBuffer(word) ? word : String(word))))
      this.socket.write(Buffer.concat([Buffer.from(`$${bytes.length}\r\n`), bytes, Buffer.from('\r\n')]))
    return new Promise((resolve, reject) => this.waiting.push({ resolve, reject }))
  }

  fail(error) { for (const { reject } of this.waiting.splice(0)) reject(error) }

  take(data) {
    this.bytes = Buffer.concat([this.bytes, data])
    for (let read; this.waiting.length && (read = this.read(0)); ) {
      this.bytes = this.bytes.subarray(read.end)
      const { resolve, reject } = this.waiting.shift()
      read.value instanceof Error ? reject(read.value) : resolve(read.value)
    }
  }

  // The value that begins at `from`, and where it ends; nothing if it is not complete yet.
  read(from) {
    const line = this.bytes.indexOf('\r\n', from)
    if (line < 0) return
    const text = this.bytes.toString('utf8', from + 1, line), size = Number(text), kind = String.fromCharCode(this.bytes[from])
    let end = line + 2
    if (kind === '+') return { value: Buffer.from(text), end }
    if (kind === '-') return { value: new Error(text), end }
    if (kind === ':') return { value: size, end }
    if (size < 0) return { value: null, end }
    if (kind === '$') return this.bytes.length < end + size + 2 ? undefined : { value: this.bytes.subarray(end, end + size), end: end + size + 2 }
    const values = []
    for (let item; values.length < size; end = item.end) {
      if (!(item = this.read(end))) return
      values.push(item.value)
    }
    return { value: values, end }
  }
}

// Sends one job with all texts. It may be sent again with the same id: the server accepts each id once.
async function submit(redis, script, service, op, client, id, texts) {
  const keys = [key(service, 'service'), ...['realtime', 'normal', 'batch'].map((each) => key(service, 'q', each)),
    key(service, 'bucket'), key(service, 'paused'), key(service, 'refused'), key(service, 'metrics'),
    key(service, 'bucket'), key(service, 'seen', id)]
  const tokens = Math.ceil(texts.join('').length / 4) + 1, body = JSON.stringify({ inputs: texts, options: {} })
  const args = [1, NORMAL, 1, 1, 1, '', id, op, texts.length, tokens, DEADLINE_MS, '', client, '', '', body]
  const call = (verb, what) => redis.send(verb, what, keys.length, ...keys, ...args)
  const [[code, reason, retryAfterMs]] = await call('EVALSHA', createHash('sha1').update(script).digest('hex')).catch((error) => {
    if (!error.message.startsWith('NOSCRIPT')) throw error
    return call('EVAL', script)
  })
  if (code !== ACCEPTED && code !== ACCEPTED_BEFORE) throw new Error(`refused: ${reason}, retry after ${retryAfterMs} ms`)
}

// Waits for the reply of a job. Entries without the field `reply` are deltas of a growing text.
async function receive(redis, service, client, id) {
  const replies = key(service, 'reply', client), ends = Date.now() + DEADLINE_MS + 5_000
  for (let after = '0'; Date.now() < ends; ) {
    const read = await redis.send('XREAD', 'COUNT', 64, 'BLOCK', 1000, 'STREAMS', replies, after)
    for (const [entry, words] of read?.[0][1] ?? []) {
      after = String(entry)
      await redis.send('XDEL', replies, entry)
      const [name, job, kind, value] = words
      if (String(name) === 'id' && String(job) === id && String(kind) === 'reply') return decode(value)
    }
  }
  throw new Error('no answer within the deadline')
}

// A reply is one line of JSON, and then the vectors of the rows without an error.
function decode(reply) {
  const line = reply.indexOf('\n'), head = JSON.parse(reply.subarray(0, line < 0 ? reply.length : line))
  if (head.error) throw new Error(`${head.error.code}: ${head.error.message}`)
  const [rows, size] = head.shape ?? [head.values.length], errors = head.errors ?? {}
  const vector = (row) => Array.from({ length: size }, (_, at) => reply.readFloatLE(line + 1 + 4 * (row * size + at)))
  const good = Array.from({ length: rows }, (_, row) => (head.shape ? vector(row) : head.values[row]))
  const all = Array.from({ length: rows + Object.keys(errors).length })
  return all.map((_, row) => (errors[row] ? { error: errors[row] } : good.shift()))
}

const [url, service, op, script, ...texts] = process.argv.slice(2), client = hex(), id = hex()
let redis
try {
  if (!texts.length) throw new Error('give a URL, a service, an operation, the path of enqueue.lua and texts')
  redis = new Redis(url)
  await submit(redis, readFileSync(script), service, op, client, id, texts)
  for (const result of await receive(redis, service, client, id)) console.log(JSON.stringify(result))
} catch (error) {
  console.error(`client.mjs: ${error.message}`)
  process.exitCode = 1
} finally {
  redis?.socket.destroy()
}
